"""Metrics and rewards: what functions give, and that whatever one does costs its own value only and leaves nothing."""

import contextlib
import datetime
import decimal
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill.grading import FunctionError, Grade, Grader, builtin, names, resolve

ROOT = Path(__file__).parent.parent
SOON = 30  # seconds, for what takes a fraction of one on a machine with nothing else to do


def until(condition) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)


@contextlib.contextmanager
def no_process_left():
    before = psutil.Process().children(recursive=True)  # other tests' own
    yield
    left = set(psutil.Process().children(recursive=True)) - set(before)
    assert not left


@pytest.fixture(autouse=True)
def watched():
    with no_process_left():
        yield


@pytest.fixture
def written(tmp_path):
    """Writes rewards.py; returns its function `score`, resolved."""

    def write(source: str, function: str = "score"):
        (tmp_path / "rewards.py").write_text(f"import os, signal, sys, time\n{source}")
        return resolve(f"{tmp_path}/rewards.py:{function}", "training.reward")

    return write


def graded(function, completions, record=None, **options) -> list[Grade]:
    with Grader(function, **options) as grader:
        return grader.grades([(record or {}, completion) for completion in completions])


# What a call does, and what its error says.
MISBEHAVIOUR = {
    "raises": ("raise ValueError('no\\nsuch\\tthing ' + 'x' * 999)", "line 3: ValueError: no such thing xxx"),
    "has an error that cannot be told": (
        "class Odd(Exception): __str__ = lambda self: 1 / 0\n    raise Odd",
        "Odd",
    ),
    "says surrogates": ("raise ValueError('\\udc80\\0')", "ValueError: ?\0"),
    "recurs": ("score(record, completion)", "RecursionError: maximum recursion depth"),
    "leaves": ("sys.exit(3)", "SystemExit: 3"),
    "is interrupted": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", "KeyboardInterrupt"),
    "exits": ("os._exit(3)", "its process ended (exit status 3)"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "its process ended (SIGKILL)"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "its process ended (SIGSEGV)"),
    "kills its group": ("os.killpg(0, signal.SIGKILL)", "its process ended (SIGKILL)"),
    "stops its keeper": ("os.kill(os.getppid(), signal.SIGSTOP); os._exit(1)", "no answer within 2 s"),
    "kills its keeper": ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)", "its process ended (SIGKILL)"),
    "hangs": ("time.sleep(600)", "no answer within 2 s"),
    "hangs in C": ("import re; re.search('(a+)+b', 'a' * 60)", "no answer within 2 s"),
    "stops": ("os.kill(os.getpid(), signal.SIGSTOP)", "no answer within 2 s"),
    "does not end when asked": (
        "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(600)",
        "no answer within 2 s",
    ),
    "eats memory": ("held = bytearray(2**31)", "MemoryError"),
    "eats memory in bites": ("held = []\n    while True: held.append(bytes(400))", "MemoryError"),
    "gives text": ("return '0.5'", "found '0.5', expected a finite number"),
    "gives bytes": ("return b'1'", "found b'1', expected a finite number"),
    "gives a list": ("return [1.0] * 9999", "found [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...], expected a finite number"),
    "gives a complex number": ("return 1j", "found 1j, expected a finite number"),
    "gives nan": ("return float('nan')", "found nan, expected a finite number"),
    "gives inf": ("return -float('inf')", "found -inf, expected a finite number"),
    "gives more than a float holds": ("return 10**400", "expected a finite number"),
    **{
        f"writes {text[:9]} into the answers": (f"write_answer({text!r})", "its process wrote what is no answer")
        for text in ("{}", '["error"]', "[" * 9999, '{"value": 1e999}', f'{{"value": {"9" * 400}}}', "\xff", "3")
    },
    "writes and writes": ("while True: write_answer('x' * 9999, end='')", "its process wrote what is no answer"),
    "closes everything": ("os.closerange(0, 64); return 1", "its process ended"),
}


HARMLESS = {
    "prints": "print('x' * 10**7); sys.stderr.write('x' * 10**7); os.write(1, b'x' * 10**6); os.system('ls')",
    "reads what nobody types": "assert sys.stdin.read() == '' and os.read(0, 9) == b''",
    "closes its output": "sys.stdout.close(); os.close(1)",
    "copies itself, and the copy returns": "os.fork()",
    "copies itself, and the copy raises": "if os.fork() == 0: raise ValueError",
    "forgets an alarm": "signal.setitimer(signal.ITIMER_REAL, 0.01)",
    "leaves a thread": "import threading; threading.Thread(target=time.sleep, args=(600,)).start()",
    "leaves a program": "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)",
    "changes the record": "record.clear()",
}


@pytest.fixture(scope="module")
def acts(tmp_path_factory) -> dict[str, tuple[Grade, Grade]]:
    """The grade of each call that does something odd, and that of an ordinary call after it, all of one batch."""
    sources = [source for source, _ in MISBEHAVIOUR.values()] + list(HARMLESS.values())
    acts = [
        f"def act_{number}(record, completion):\n    {source}\n    return 1" for number, source in enumerate(sources)
    ]
    path = tmp_path_factory.mktemp("acts") / "rewards.py"
    path.write_text("\n".join(["import os, signal, sys, time", *acts, ORDINARY]))
    completions = [text for number in range(len(acts)) for text in (f"act_{number}", str(number))]
    with no_process_left():
        found = graded(resolve(f"{path}:score", "key"), completions, {"answer": 1}, memory_gib=0.1, timeout_seconds=2)
    return dict(zip([*MISBEHAVIOUR, *HARMLESS], zip(found[::2], found[1::2], strict=True), strict=True))


ORDINARY = """
def write_answer(text, end="\\n"):
    is_pipe = lambda n: os.path.exists(place := f"/proc/self/fd/{n}") and os.readlink(place).startswith("pipe:")
    for number in filter(is_pipe, range(3, 10)):
        try:
            os.write(number, (text + end).encode("latin-1"))
        except OSError:  # the pipe that calls come by
            pass

def score(record, completion):
    if completion.isdigit():
        time.sleep(0.02)
        return len(record) * int(completion)
    return globals()[completion](record, completion)
"""


@pytest.mark.parametrize("what", MISBEHAVIOUR)
def test_a_call_that_goes_wrong_costs_its_own_value(acts, what):
    bad, next_one = acts[what]
    assert next_one == (list(acts).index(what), None)
    assert bad.value is None
    assert MISBEHAVIOUR[what][1] in bad.error
    assert len(bad.error) <= 300
    assert "\n" not in bad.error


@pytest.mark.parametrize("what", HARMLESS)
def test_a_call_that_does_odd_things_has_its_value(acts, what):
    assert acts[what] == ((1, None), (list(acts).index(what), None))


DAEMON = """
def score(record, completion):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open(record["pids"], "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(600)
        os._exit(0)
    while not os.path.exists(record["pids"]):
        time.sleep(0.01)
    if completion == "hang":
        time.sleep(600)
    return 1.0
"""


@pytest.mark.parametrize("end", ["close", "hang", "forgotten", "interrupted"])
def test_not_even_a_daemon_is_left(written, tmp_path, monkeypatch, end):
    pids = tmp_path / "pids"
    grader = Grader(written(DAEMON), timeout_seconds=1 if end == "hang" else 60)
    if end == "interrupted":
        monkeypatch.setattr("distill.grading.grader.exchange", interrupt_when(pids.exists))
        with pytest.raises(KeyboardInterrupt):
            grader.grades([({"pids": str(pids)}, "hang")])
    else:
        (grade,) = grader.grades([({"pids": str(pids)}, end)])
        assert grade == ((None, "no answer within 1 s") if end == "hang" else (1.0, None))
    until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    if end == "close":
        assert psutil.pid_exists(int(pids.read_text()))
        grader.close()
    del grader
    assert not psutil.pid_exists(int(pids.read_text()))


def interrupt_when(condition):
    from distill.grading.process import exchange

    def interrupted(processes, at=None):
        exchange(processes, time.monotonic() + 0.05)
        if condition():
            raise KeyboardInterrupt

    return interrupted


@pytest.mark.parametrize("copied", [False, True])
def test_the_death_of_the_caller_leaves_nothing(written, tmp_path, copied):
    """Nor where a copy of the caller lives on, with the caller's end of the pipes."""
    function, pids = written(DAEMON), tmp_path / "pids"
    program = f"""
import os, time
from distill.grading import Grader, resolve
grader = Grader(resolve({function.reference!r}, "key"))
grader.start()
if {copied} and os.fork() == 0:
    time.sleep(600)
    os._exit(0)
grader.grades([({{"pids": {str(pids)!r}}}, "hang")])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    caller = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    daemon = psutil.Process(int(pids.read_text()))
    until(lambda: daemon.parent().ppid() == caller.pid)  # the keeper has adopted it
    started = [daemon.parent(), *daemon.parent().children()]
    caller.kill()
    caller.wait()
    until(lambda: not any(process.is_running() for process in started))
    if copied:
        os.killpg(caller.pid, signal.SIGKILL)


def test_a_function_that_only_hangs_costs_a_few_limits(written):
    began = time.monotonic()
    found = graded(written("def score(record, completion): time.sleep(600)"), ["x"] * 200, timeout_seconds=0.3)
    assert {grade.value for grade in found} == {None}
    assert found[0].error == "no answer within 0.3 s"
    assert sum(grade.error == found[0].error for grade in found) == 3
    assert found[-1].error == "not tried, as the last 3 calls were lost: no answer within 0.3 s"
    assert time.monotonic() - began < SOON  # instead of a minute


def test_a_function_that_ever_again_ends_its_process_is_given_up_later(written):
    source = "def score(record, completion):\n    if completion == 'x': os._exit(1)\n    return 1"
    found = graded(written(source), [*"1x1", *("x" * 40)])
    assert [grade.value for grade in found[:3]] == [1.0, None, 1.0]
    assert sum(grade.error == "its process ended (exit status 1)" for grade in found) == 11
    assert found[-1].error == "not tried, as the last 10 calls were lost: its process ended (exit status 1)"


def test_a_file_that_loads_only_once(written, tmp_path):
    source = f"""
if os.path.exists({str(tmp_path / "loaded")!r}):
    raise OSError('a second time')
open({str(tmp_path / "loaded")!r}, 'w')
def score(record, completion):
    return 1 if completion == '1' else os._exit(1)
"""
    found = graded(written(source), ["1", "x", "1", "1"], processes=1)
    why = "no process can be had: line 4: OSError: a second time"
    assert found == [(1.0, None), (None, "its process ended (exit status 1)"), (None, why), (None, why)]


def test_several_processes_keep_the_order_and_load_once_each(written, tmp_path):
    source = f"""
with open({str(tmp_path / "loads")!r}, 'a') as file:
    file.write(f'{{os.getpid()}}\\n')
calls = 0
def score(record, completion):
    global calls
    calls += 1
    time.sleep(float(completion))
    record['index'] == 0 or calls
    return record['index'] + os.getpid() / 2**32
"""
    calls = [({"index": index}, str(0.02 + 0.01 * (index % 3))) for index in range(60)]
    with Grader(written(source), processes=3) as grader:
        before = len(psutil.Process().children())
        found = grader.grades(calls)
        assert len(psutil.Process().children()) <= before + 2
        assert [int(grade.value) for grade in found] == list(range(60))
        assert 2 <= len({grade.value % 1 for grade in found}) <= 3
        again = grader.grades(calls)
    assert [int(grade.value) for grade in again] == list(range(60))
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) <= 3


def test_records_and_completions_arrive_as_they_are(written):
    record = {
        "when": datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
        "raw": b"\x00\xff",
        "exact": decimal.Decimal("1.10"),
        "list": [1, {"a": None}],
        "large": "x" * 10**6,
    }
    written_record = {name: value for name, value in record.items() if name != "large"}
    source = f"import datetime\nfrom decimal import Decimal\nWANTED = {written_record!r} | {{'large': 'x' * 10**6}}\n"
    source += "def score(record, completion): return record == WANTED and len(completion)"
    found = graded(written(source), ["", "a\0b", "\udc80", "x" * 10**6, "🙂"], record)
    assert found == [(0.0, None), (3.0, None), (1.0, None), (1e6, None), (1.0, None)]


class OfThisTest:
    pass


def test_a_record_that_cannot_be_sent_or_read_costs_its_own_value(written):
    calls = [({}, "1"), ({"f": lambda: 0}, "2"), ({"f": OfThisTest()}, "3"), ({}, "4")]
    with Grader(written("def score(record, completion): return int(completion)")) as grader:
        first, unsent, unread, last = grader.grades(calls)
        assert grader.grades([]) == []
        assert grader.grades(calls[1:2]) == [unsent]
    assert (first.value, last.value) == (1.0, 4.0)
    assert "its record cannot be sent" in unsent.error
    assert "lambda" in unsent.error
    # It may be that the class is found there as it is here.
    assert unread == (3.0, None) or "cannot be read in the function's process" in unread.error


def test_numbers_of_all_kinds_and_none(written):
    numbers = {
        "True": 1.0,
        "-3": -3.0,
        "0.1": 0.1,
        "None": None,
        "__import__('decimal').Decimal('0.5')": 0.5,
        "__import__('numpy').float32(0.5)": 0.5,
        "__import__('numpy').bool_(True)": 1.0,
    }
    found = graded(written("def score(record, completion): return eval(completion)"), list(numbers))
    assert found == [(number, None) for number in numbers.values()]


def test_the_function_is_what_the_run_began_with(written, tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("NUMBER = 5")
    monkeypatch.chdir(tmp_path)
    written("import helper\ndef score(record, completion):\n    return helper.NUMBER if completion else os._exit(1)")
    content = (tmp_path / "rewards.py").read_bytes()
    function = resolve("rewards.py:score", "key")
    assert (function.name, function.reference) == ("score", "rewards.py:score")
    assert function.sha256 == hashlib.sha256(content).hexdigest()
    grader = Grader(function)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "rewards.py").write_text("changed =")
    with grader:
        assert [grade.value for grade in grader.grades([({}, "1"), ({}, ""), ({}, "2")])] == [5.0, None, 5.0]


@pytest.mark.parametrize("name", ["json", "statistics", "conftest"])
def test_a_file_may_have_the_name_of_another_module(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'\ndef score(record, completion): return 2\n"
    )
    assert graded(resolve(f"{tmp_path}/{name}.py:score", "key"), ["x"]) == [(2.0, None)]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def other(record, completion): return 1", "has no function score; it has other"),
        ("score = 3", "has no function score; it has none"),
        ("def score(completion): return 1", "score(completion) cannot be called with a record and a completion"),
        ("def score(record, completion, more): return 1", "cannot be called with a record"),
        ("def score(record, completion)\n", "line 2: SyntaxError: expected ':'"),
        ("import nothing_of_that_name", "line 2: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("sys.exit('enough')", "line 2: SystemExit: enough"),
        ("os._exit(4)", "its process ended (exit status 4)"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_of_at_the_start(written, source, said):
    function = written(source)
    with pytest.raises(FunctionError) as error, Grader(function):
        pass
    assert str(error.value).startswith(f"training.reward: {function.reference}: ")
    assert said in str(error.value)


def test_a_file_that_cannot_be_used_gives_errors_without_a_start(written):
    found = Grader(written("import nothing_of_that_name")).grades([({}, "x")] * 2)
    assert (
        found
        == [(None, "no process can be had: line 2: ModuleNotFoundError: No module named 'nothing_of_that_name'")] * 2
    )


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("exact_mach", "no built-in function exact_mach; exact_match is near. Built in are exact_match, contains,"),
        ("json_valid:answer", "json_valid reads no column"),
        ("contains:", "no column after the :"),
        ("nowhere/rewards.py:score", "there is no such file in"),
        ("nowhere/rewards.py", "say which function of the file, as in nowhere/rewards.py:score"),
        ("rewards.txt:score", "rewards.txt is no .py file"),
        ("rewards.py:", "expected FILE.py:FUNCTION"),
        ("rewards.py:a b", "found 'a b' after the last :"),
        ("", "Built in are"),
    ],
)
def test_references_that_name_nothing(reference, said):
    with pytest.raises(FunctionError) as error:
        resolve(reference, "evaluation.metrics")
    assert str(error.value).startswith(f"evaluation.metrics: {reference}: ")
    assert said in str(error.value)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FunctionError, match=r"math_verify: pip install 'distill-on-policy\[math\]'"):
        resolve("math", "key")
    assert resolve("exact_match", "key").sha256 is None


def test_figures_have_names_of_their_own(written):
    score, exact = written("def score(record, completion): return 1"), resolve("exact_match", "key")
    other = written("def score_2(record, completion): return 1", "score_2")
    assert names([exact, score, score, other, score]) == ["exact_match", "score", "score_3", "score_2", "score_4"]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
OLD = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}
META = {"$ref": "https://json-schema.org/draft/2020-12/schema"}


@pytest.mark.parametrize(
    ("name", "value", "completion", "wanted"),
    [
        ("exact_match", "Paris", " Paris\n", 1),
        ("exact_match", "Paris", "Paris.", 0),
        ("exact_match", 42, "42", 1),
        ("exact_match", ["a", "b "], "b", 1),
        ("exact_match", "", " ", 1),
        ("contains", ["x", "Paris"], "It is Paris.", 1),
        ("contains", "Paris", "It is paris.", 0),
        ("regex", r"^\d+$", "12\n", 1),
        ("regex", [r"^a", r"b$"], "cc", 0),
        ("json_valid", None, ' {"a": [1, 2.5e3, null]}\n', 1),
        ("json_valid", None, "NaN", 0),
        ("json_valid", None, "[Infinity]", 0),
        ("json_valid", None, '```json\n{"a": 1}\n```', 0),
        ("json_valid", None, '{"a": 1} done', 0),
        ("json_valid", None, "", 0),
        ("json_valid", None, '"a\0b"', 0),
        ("json_valid", None, "1" * 5000, 1),
        ("json_valid", None, "[" * 100_000, 0),
        ("json_schema", SCHEMA, '{"n": 3}', 1),
        ("json_schema", json.dumps(SCHEMA), '{"n": "3"}', 0),
        ("json_schema", SCHEMA, "not JSON", 0),
        ("json_schema", OLD, "3", 0),  # in later drafts, exclusiveMaximum is a number
        ("json_schema", OLD, "2", 1),
        ("json_schema", META, '{"type": "string"}', 1),
        ("json_schema", META, '{"type": 3}', 0),
        ("json_schema", True, "3", 1),
    ],
)
def test_built_in_functions(name, value, completion, wanted):
    column = {"regex": "pattern", "json_schema": "schema"}.get(name, "answer")
    assert builtin.BUILT_IN[name]({column: value}, completion) == wanted


@pytest.mark.parametrize(
    ("reference", "value", "said"),
    [
        ("exact_match:solution", "x", "the record has no column 'solution'; it has answer, prompt"),
        ("exact_match", None, "the record's column 'answer' holds None"),
        ("contains", [], "the record's column 'answer' holds []"),
        ("contains", " ", "is empty, and every completion contains that"),
        ("regex:answer", "(", "missing )"),
        ("json_schema:answer", {"type": "no such"}, "SchemaError: 'no such' is not valid"),
        ("json_schema:answer", "{", "JSONDecodeError"),
        ("json_schema:answer", {"$ref": "http://127.0.0.1:9/schema"}, "Unresolvable: http://127.0.0.1:9/schema"),
        ("json_schema:answer", [SCHEMA, SCHEMA], "holds 2 schemas, expected one"),
    ],
)
def test_a_record_that_a_built_in_function_cannot_use(reference, value, said):
    name, _, column = reference.partition(":")
    with pytest.raises(Exception) as error:  # noqa: PT011 (each library's own)
        builtin.BUILT_IN[name]({"answer": value, "prompt": "p"}, "1", column or "answer")
    assert said in f"{type(error.value).__name__}: {error.value}"


def test_a_column_is_named_after_the_function():
    calls = [({"solution": "a"}, "a"), ({"solution": "b"}, "a")]
    with Grader(resolve("exact_match:solution", "key")) as grader:
        assert grader.grades(calls) == [(1.0, None), (0.0, None)]


def test_mathematical_answers():
    pytest.importorskip("math_verify")
    records = [
        ("1/2", r"So it is $\frac{2}{4}$.", 1.0),
        (r"$\frac{1}{2}$", r"\boxed{0.5}", 1.0),
        (r"\boxed{x+1}", r"$1+x$", 1.0),
        (42, "The answer is 42.", 1.0),
        (["1", "2"], r"$2$", 1.0),
        ("3", r"$2$", 0.0),
        ("3", "\udc80\0", 0.0),
        ("3", "", 0.0),
        (r"$$", "3", None),
    ]
    with Grader(resolve("math", "key"), timeout_seconds=60) as grader:
        found = grader.grades([({"answer": answer}, completion) for answer, completion, _ in records])
    assert [grade.value for grade in found] == [wanted for *_, wanted in records], found
    assert "finds no answer" in found[-1].error


def test_a_thousand_calls_of_one_process():
    calls = [({"prompt": "x" * 200, "answer": str(index % 3)}, str(index % 2)) for index in range(1000)]
    with Grader(resolve("exact_match", "key"), processes=1) as grader:
        found = [grader.grades(calls) for _ in range(2)]
    expected = [float(index % 3 == index % 2) for index in range(1000)]
    assert [[grade.value for grade in grades] for grades in found] == [expected] * 2
