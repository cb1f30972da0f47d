"""Every verb from outside."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hayai as package
from chat_model import CONTEXT
from hayai.cli.main import VERBS
from hayai_process import COMMAND, Hayai
from server_process import start_server

REFERENCE = ("--backend", "reference")


def test_help_and_version(hayai: Hayai) -> None:
    top = hayai("--help")
    assert top.returncode == 0 and top.stderr == ""
    assert all(re.search(rf"^  {verb} +\S", top.stdout, re.MULTILINE) for verb in VERBS)
    bare = hayai()
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", top.stdout)
    assert hayai("--version").stdout == f"hayai {package.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(hayai: Hayai, verb: str) -> None:
    shown = hayai(verb, "--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert shown.stdout.startswith(f"Usage: hayai {verb}") and "--help" in shown.stdout


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["nonsense"], "No such command 'nonsense'", "hayai --help"),
        (["run", "--frob", "x"], "No such option", "hayai run --help"),
        (["run"], "Missing argument 'PROMPT'", "hayai run --help"),
        (["run", "--threads", "0", "x"], "0 is not in the range", "hayai run --help"),
        (["run", "--raw", "--system", "s", "x"], "--system needs the chat template", "hayai run --help"),
    ],
)
def test_wrong_usage(hayai: Hayai, args: list[str], error: str, hint: str) -> None:
    done = hayai(*args)
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ") and error in first and second == f"hint: {hint}"


def test_run_is_repeatable_and_raw_differs(hayai: Hayai, chat_model: Path) -> None:
    call = ("run", "-m", chat_model, *REFERENCE, "--max-tokens", "8")
    one, two, raw = hayai(*call, "Hello"), hayai(*call, "Hello"), hayai(*call, "--raw", "Hello")
    assert one.returncode == 0 and one.stderr == "" and len(one.stdout) > 8
    assert one.stdout == two.stdout != raw.stdout


def test_run_reads_stdin_and_shows_its_speed(hayai: Hayai, chat_model: Path) -> None:
    call = ("run", "-m", chat_model, *REFERENCE, "-n", "6", "--temperature", "1", "--seed", "7")
    piped = hayai(*call, "--stats", "-", stdin="Hello there")
    assert piped.stdout == hayai(*call, "Hello there").stdout
    pattern = (
        r"prompt \d+ tokens · [\d,]+ tokens/s · first token \d+ ms · answer 6 tokens · [\d,.]+ tokens/s\n"
    )
    assert re.fullmatch(pattern, piped.stderr)


def test_run_without_the_default_model(hayai: Hayai, tmp_path: Path) -> None:
    done = hayai("run", "x", env={"HAYAI_HOME": str(tmp_path)})
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: the default model is not in the cache") and str(tmp_path) in error
    assert hint.startswith("hint: ") and "`hayai pull`" in hint


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "inspect"])
def test_models_that_are_none(hayai: Hayai, tmp_path: Path, verb: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model at all, but long enough")
    port = ("--port", "0") if verb == "serve" else ()
    for path, text in ((bad, "GGUF"), (tmp_path / "missing.gguf", "no model file")):
        args = (path,) if verb == "inspect" else ("-m", path, *REFERENCE, *port)
        done = hayai(verb, *args, *(("x",) if verb == "run" else ()))
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and text in done.stderr and str(path) in done.stderr


def test_run_says_both_numbers_when_the_prompt_is_too_long(hayai: Hayai, chat_model: Path) -> None:
    done = hayai("run", "-m", chat_model, *REFERENCE, "--raw", "-", stdin="one two " * 400)
    assert done.returncode == 1 and done.stdout == ""
    assert re.match(rf"error: the prompt has \d+ tokens, .* {CONTEXT} tokens\n", done.stderr)


def test_bad_values_name_their_option(hayai: Hayai, chat_model: Path) -> None:
    done = hayai("run", "-m", chat_model, *REFERENCE, "--temperature", "3", "x")
    assert done.returncode == 1 and "temperature must be from 0 to 2: 3.0" in done.stderr
    unknown = hayai("run", "x", env={"HAYAI_TREADS": "2"})
    assert unknown.returncode == 1 and "unknown environment variable HAYAI_TREADS" in unknown.stderr


def test_run_ends_quietly_when_its_reader_leaves(chat_model: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "run", "-m", str(chat_model), *REFERENCE, "-n", "400", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(chat_model: Path) -> None:
    command = [*COMMAND, "run", "-m", str(chat_model), *REFERENCE, "-n", "2", "x"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and re.fullmatch(r"error: .*No space left on device\n", done.stderr)


def test_ctrl_c_ends_run_with_130(chat_model: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "run", "-m", str(chat_model), *REFERENCE, "-n", "450", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in errors


def test_run_imports_no_server(chat_model: Path) -> None:
    """Start-up time: what `hayai run` does not need is not imported."""
    code = (
        "import sys, hayai.cli.main as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print([n for n in ('fastapi', 'starlette', 'uvicorn', 'pydantic', 'rich', 'asyncio.base_events') "
        "if n in sys.modules])\n"
    )
    args = ["run", "-m", str(chat_model), *REFERENCE, "-n", "1", "x"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    loaded = done.stdout.splitlines()[-1]
    assert not {"fastapi", "starlette", "uvicorn", "pydantic", "rich"} & set(re.findall(r"\w+", loaded)), done


def test_chat_over_a_pipe(hayai: Hayai, chat_model: Path) -> None:
    call = ("chat", "-m", chat_model, *REFERENCE, "-n", "5")
    script = (
        "Hello\n/help\n\n/nonsense\nAgain, \\\nplease\n/system Be brief.\nHello\n/reset\n/exit\nnever read\n"
    )
    done = hayai(*call, stdin=script)
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert len(answers) >= 3
    prompts = [int(n) for n in re.findall(r"\[prompt (\d+) tokens", done.stderr)]
    assert len(prompts) == 3 and prompts[1] > prompts[0] and "unknown command: /nonsense" in done.stderr
    assert "/reset           forget" in done.stderr and "[new conversation]" in done.stderr
    assert "never read" not in done.stdout + done.stderr


def test_chat_survives_a_message_that_is_too_long(hayai: Hayai, chat_model: Path) -> None:
    done = hayai("chat", "-m", chat_model, *REFERENCE, "-n", "3", stdin="word " * 600 + "\nshort\n")
    assert done.returncode == 0
    assert f"context of {CONTEXT} tokens" in done.stderr and "hint: /reset" in done.stderr
    assert done.stderr.count("[prompt ") == 1


def test_inspect(hayai: Hayai, chat_model: Path) -> None:
    text = hayai("inspect", chat_model)
    assert text.returncode == 0 and text.stderr == ""
    for line in ("architecture     llama", "chat template    yes", f"context          {CONTEXT} tokens"):
        assert line in text.stdout
    assert "plan main" in text.stdout and "q8_0" in text.stdout and "blk.0" not in text.stdout

    more = hayai("inspect", chat_model, "--tensors", "--metadata", "--plan", "--json")
    report = json.loads(more.stdout)
    tensors = report["tensor_list"]
    weights = report["memory"]["weights_bytes"]
    assert len(tensors) == report["tensors"] and sum(t["bytes"] for t in tensors) == weights
    elements = sum(f["elements"] for f in report["formats"].values())
    assert report["parameters"] == elements
    assert report["bits_per_weight"] == round(8 * weights / elements, 3)
    assert report["config"]["hidden_size"] == 32 and "embed: " in report["plans"]["main"]
    assert report["metadata"]["tokenizer.ggml.tokens"].startswith("[49152 values: ")
    # two layers, one head of 16 + 16, 16 bits, 2048 capped to the model's context
    assert report["memory"]["cache_bytes"] == 2 * 1 * 32 * 2 * CONTEXT


def test_inspect_the_default_model(hayai: Hayai, default_model: Path) -> None:
    report = json.loads(hayai("inspect", "--json").stdout)
    assert report["parameters"] == 134_515_008 and report["architecture"] == "llama"
    assert 5.0 < report["bits_per_weight"] < 7.0 and report["file"] == str(default_model)


def test_doctor(hayai: Hayai, tmp_path: Path) -> None:
    done = hayai("doctor", "--quick", "--json")
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    assert {"hayai", "processor", "core", "cores", "memory", "huge pages", "default model"} == set(findings)
    assert done.returncode == (1 if any(f["state"] == "fail" for f in findings.values()) else 0)
    assert findings["cores"]["data"]["usable"] >= 1 and findings["default model"]["state"] == "ok"

    empty = hayai("doctor", "--quick", env={"HAYAI_HOME": str(tmp_path)})
    assert empty.returncode == 1
    assert re.search(r"^fail +default model +not in the cache: .*\n +mend: hayai pull$", empty.stdout, re.M)


def test_pull_is_done_when_the_model_is_there(hayai: Hayai, default_model: Path) -> None:
    done = hayai("pull")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{default_model}\n", "")


def test_serve_refuses_a_port_in_use_before_it_loads(hayai: Hayai, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        began = time.monotonic()
        done = hayai("serve", "--port", port, "-m", tmp_path / "not-even-looked-at.gguf")
    assert done.returncode == 1 and time.monotonic() - began < 10
    assert re.fullmatch(rf"error: can't listen on 127\.0\.0\.1:{port}: .+\n", done.stderr)


def test_serve_refuses_the_network_without_being_told(hayai: Hayai) -> None:
    done = hayai("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1 and "--allow-remote" in done.stderr


def test_serve_prints_configuration_and_a_command_that_works(chat_model: Path) -> None:
    server = start_server(chat_model, "--context", "128", "--max-sequences", "3")
    lines = dict(re.findall(r"^(\S+)  +(.+)$", server.head, re.MULTILINE))
    assert (
        lines["model"] == "tiny-chat" and lines["context_length"] == "128" and lines["max_sequences"] == "3"
    )
    assert server.process.stdout is not None
    curl = ""
    for line in server.process.stdout:
        curl += line
        if '"stream": true' in line:
            break
    shell = curl.partition("try it:\n")[2].replace("curl -N", "curl -sN")
    shown = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=30)
    if "not found" not in shown.stderr:  # a machine without curl
        assert shown.stdout.startswith("data: {") and shown.stdout.endswith("data: [DONE]\n\n")
    assert server.interrupt() == (0, "stopped\n")
