"""A stand-in of the Hugging Face hub: what making a repository and pushing a folder to it ask, over HTTP."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_a_token_that_may_write"


class Hub:
    """Repositories by name at `url`; `fails` are the beginnings of paths that are answered with a status."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.fails: dict[str, int] = {}
        self._large: dict[str, bytes] = {}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_) -> None: ...

            def do_GET(self) -> None:
                owner._answer(self, b"")

            def do_POST(self) -> None:
                owner._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_PUT = do_POST  # noqa: N815 (what the base class calls)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = request.path.partition("?")[0]
        status, found = self._found(request.command, path, request.headers.get("Authorization"), body)
        content = json.dumps(found).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _found(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, dict]:
        if fault := next((status for beginning, status in self.fails.items() if beginning in path), None):
            return fault, {"error": f"as the test has it: {fault}"}
        if path.startswith("/upload/") and method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/upload/")
            self._large[path.removeprefix("/upload/")] = body
            return 200, {}
        if path == "/verify":
            return (200 if json.loads(body)["oid"] in self._large else 404), {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"type": "access_token"}}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._told(each) for each in json.loads(body)["objects"]]}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.private:
            return 404, {"error": "Repository not found"}
        if path == f"/api/models/{name}":
            return 200, {"id": name, "modelId": name, "private": self.private[name], "tags": [], "siblings": []}
        if path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if each.endswith(".safetensors") else "regular" for each in paths]
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
            return 200, {"files": files}
        if path.endswith("/commit/main"):
            self._commit(name, body)
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}"}
        return 404, {"error": f"{method} {path}"}

    def _create(self, asked: dict) -> tuple[int, dict]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.url}/{name}", "name": name}
        if name in self.private:
            return 409, url | {"error": "You already created this model repo"}
        if asked.get("organization") not in (None, "me"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.files[name] = {}
        return 200, url

    def _told(self, asked: dict) -> dict:
        actions = {"upload": {"href": f"{self.url}/upload/{asked['oid']}"}, "verify": {"href": f"{self.url}/verify"}}
        return asked | ({} if asked["oid"] in self._large else {"actions": actions})

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self._large[value["oid"]]
