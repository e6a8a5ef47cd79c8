"""The reports of ``check``: their contents, and whether they are true."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_ins import FAULTS, StandIn, cpu_as_accelerator

import deberta_fast
from deberta_fast import selfcheck
from deberta_fast.cli import main
from deberta_fast.op import backends, speed
from deberta_fast.op.backends import cpu, cuda

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))


@pytest.fixture(scope="module")
def report():
    """A report on all kinds of calls in one dtype, with times of small shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SHAPES", {"short": (2, 16), "long": (1, 128)})
        return deberta_fast.check("cpu", head_size=16, dtypes=(torch.bfloat16,))


def test_every_instruction_set_of_a_cpu(report):
    rows = {row.name: row for row in report.rows}
    sets = [f"cpu ({name})" for name in cpu.instruction_sets()]
    assert list(rows) == [*sets, "cuda", "triton", "eager", "SDPA"] and sets[-1] == "cpu (plain)"
    for name in (*sets, "eager"):
        assert rows[name].passed and rows[name].problems == report.asked == 19
        assert 0 < rows[name].share < 0.9 and rows[name].where
    assert rows["cuda"].reasons and rows["triton"].reasons and not rows["cuda"].passed
    for name in (sets[0], "eager"):
        assert rows[name].milliseconds.keys() == rows["SDPA"].milliseconds.keys()
        for key, time in rows[name].milliseconds.items():
            assert time > 0 and rows[name].times_sdpa[key] == time / rows["SDPA"].milliseconds[key]
    assert report.passed and report.taken["bfloat16"].startswith("cpu, ")


def test_the_table_and_json(report):
    text = str(report)
    assert all(len(line) <= 160 for line in text.splitlines())
    for words in ("torch", "Triton", "device", "CPU kernels", "CUDA kernels", "bfloat16", "cpu (plain)", "19 of 19"):
        assert words in text
    assert "not asked: " in text and "backend=None takes cpu" in text and "passed in every dtype" in text
    again = json.loads(json.dumps(report.as_dict()))
    assert again["machine"]["torch"].startswith(torch.__version__) and again["passed"] is True
    assert [row["name"] for row in again["rows"]] == [row.name for row in report.rows]


def test_readme_shows_what_is_printed(report):
    """The lines are the same, except for numbers and the description of the machine."""
    block = (ROOT / "README.md").read_text().partition("```text\n")[2].partition("```")[0].splitlines()
    wording = report._replace(shapes={"short": (8, 128), "long": (1, 2048)}, head_size=64)
    shown, printed = ({line[:13].strip(): line for line in lines} for lines in (block, str(wording).splitlines()))
    assert shown.keys() >= printed.keys() - {"cpu (amx)"}  # which README's machine lacks
    for label in ("head size 64;", "bfloat16", "backend=Non", "a fused backe"):
        assert shown[label] == printed[label]


def test_the_instruction_set_is_put_back(monkeypatch):
    told = []
    monkeypatch.setattr(torch.ops.deberta_fast, "use_instruction_set", told.append)
    with pytest.raises(ZeroDivisionError), cpu.using("plain"):
        raise ZeroDivisionError
    assert told == ["plain", cpu.instruction_set()]


def test_another_instruction_set_is_used(monkeypatch):
    """Otherwise all rows of a report would be about the same kernels."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 1, 200, 64)
    bits = set()
    for name in cpu.instruction_sets():
        with cpu.using(name):
            outputs = [
                deberta_fast.disentangled_attention(*(x.to(dtype) for x in qkv), backend="cpu")
                for dtype in (torch.float32, torch.bfloat16)
            ]
            bits.add(torch.cat([x.float() for x in outputs]).numpy().tobytes())
    assert len(bits) == len(cpu.instruction_sets())


def test_command_line(capsys, monkeypatch):
    assert main(["check", "--device", "cpu", "--dtype", "float32", "--head-size", "16", "--quick"]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert main(["check", "--device", "cpu", "--dtype", "bfloat16", "--head-size", "16", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == 3
    monkeypatch.setitem(backends.BACKENDS, "cpu", StandIn(FAULTS["a wrong slot"][0]))
    assert main(["check", "--device", "cpu", "--dtype", "float32", "--head-size", "16", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "FAILED after 0 of 3: problem 'short, holes': output: max error" in out and "NO FUSED BACKEND PASSED" in out


def test_as_a_newcomer_calls_it():
    """It runs in a process of its own, where nothing is imported yet."""
    run = [sys.executable, "-W", "error", "-m", "deberta_fast", "check", "--device", "cpu", "--quick"]
    done = subprocess.run([*run, "--head-size", "16"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "a fused backend passed in every dtype" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "nonsense"], "torch cannot use device 'nonsense'"),
        (["--device", "cuda:99"], "torch cannot use device 'cuda:99'"),
        (["--device", "cpu", "--head-size", "0"], "head_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_checked(arguments, message, capsys):
    assert main(["check", *arguments]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert message in captured.err and "Traceback" not in captured.err


def test_no_such_dtype():
    with pytest.raises(ValueError, match=r"dtypes must be among torch.float32, .*, got torch.float64"):
        deberta_fast.check("cpu", dtypes=(torch.float64,))


# On an accelerator; the CPU stands in for it


@pytest.fixture
def accelerator():
    with cpu_as_accelerator(cuda=2.0, triton=1.0) as install:
        yield install


def quick(**options):
    return deberta_fast.check("cpu", head_size=16, dtypes=(torch.bfloat16,), quick=True, **options)


def test_what_a_process_will_take(accelerator, recwarn):
    accelerator()
    report = quick()
    assert report.passed and report.taken == {"bfloat16": "triton: the fastest that passed"}
    accelerator(triton=StandIn(FAULTS["an exception"][0]))  # a second call checks the backends again
    report = quick()
    assert report.passed and report.taken == {"bfloat16": "cuda: the fastest that passed"}
    (failed,) = (row for row in report.rows if row.failure)
    assert failed.name == "triton" and "Failed to find C compiler" in failed.failure
    accelerator(StandIn(FAULTS["a NaN"][0]), StandIn(reasons=["no Triton"]))
    report = quick()
    assert report.taken == {"bfloat16": "eager: no fused backend passed"}
    assert re.search(r"triton +not asked: no Triton", str(report))
    assert not recwarn.list  # the report says it all
    deberta_fast.set_backend_check(False)
    assert quick().taken == {"bfloat16": "what set_backend_check(False) asked for, eager"}


def test_times_of_an_accelerator(accelerator, monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", {"short": (2, 16), "long": (1, 128)})
    accelerator(cuda=StandIn(FAULTS["a NaN"][0]))
    rows = {row.name: row for row in deberta_fast.check("cpu", head_size=16, dtypes=(torch.bfloat16,)).rows}
    assert list(rows) == ["cuda", "triton", "eager", "SDPA"]  # no row is about the CPU kernels
    assert rows["triton"].problems == 19 and rows["cuda"].problems < 19
    assert [name for name, row in rows.items() if row.milliseconds] == ["triton", "eager", "SDPA"]


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpu, "NOT_LOADED", "the extension deberta_fast._C was not built")
    report = quick()
    rows = {row.name: row for row in report.rows}
    assert rows["cpu"].reasons == ("the extension deberta_fast._C was not built",) and rows["eager"].passed
    assert not report.passed and report.taken["bfloat16"].startswith("eager, ")


def test_the_cuda_kernels_are_named(monkeypatch):
    monkeypatch.setattr(cuda, "architectures", lambda: ["sm_80", "sm_90", "compute_90"])
    assert selfcheck._machine(torch.device("cpu"))["CUDA kernels"] == "sm_80, sm_90, compute_90"


def test_several_processors_have_one_name(monkeypatch):
    told = "processor : 0\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\n\nprocessor : 1\nmodel name : another\n"
    monkeypatch.setattr(selfcheck.Path, "read_text", lambda path: told)
    assert selfcheck.processor() == "AMD EPYC (family 25, model 17)"
    monkeypatch.setattr(selfcheck.Path, "read_text", lambda path: "processor : 0\nCPU implementer : 0x41\n")
    assert selfcheck.processor() in (platform.processor(), platform.machine())
