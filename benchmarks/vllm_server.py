"""A vLLM server on this machine's CPU as a child process, for the tests in tests/vllm and the benchmark.

Its interpreter, that of tests/vllm/environment.sh, is named by DISTILL_VLLM_PYTHON.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

PYTHON = os.environ.get("DISTILL_VLLM_PYTHON")
STARTS_WITHIN = 600  # seconds


class VllmServer:
    """Serves `folder` in `dtype` at `url` from `start` to `stop`; what it says is in `log`."""

    def __init__(
        self, folder: str | Path, dtype: str, log: Path, *, options: Sequence[str] = (), imports: str | Path = ""
    ) -> None:
        """With further `options`, which may name a module of the folder `imports`."""
        self.folder, self.dtype, self.log, self._options, self._imports = folder, dtype, log, options, str(imports)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> float:
        """Returns when it answers: the seconds that took."""
        began = time.monotonic()
        # The `vllm` command asks for a distribution of that name, which the CPU build is not.
        module = ["-m", "vllm.entrypoints.launchers.api_server.entry"]
        options = ["--model", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port), "--dtype", self.dtype]
        options += ["--generation-config", "vllm", "--enforce-eager", "--max-model-len", "1024", *self._options]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")
        }
        environment |= {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": self._imports,
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [PYTHON, *module, *options], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        while time.monotonic() - began < STARTS_WITHIN:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - began
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the vLLM server did not start; the end of {self.log}:\n{self.log.read_text()[-2000:]}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops its processes meanwhile, which take time of the cores even when nothing is asked of them."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Kills it and its workers at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
