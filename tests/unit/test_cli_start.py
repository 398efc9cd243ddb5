"""The command answers at once: nothing heavy is imported before a verb needs it, and every verb explains itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from diffusion_core.stages.registry import STAGES
from diffusion_core.store.patience import StoreUnavailable
from flows import cli

HEAVY = ("torch", "ray", "prefect", "mlflow", "pandas", "pyarrow", "numpy", "pydantic", "boto3", "sklearn", "scipy")
VERBS = ["demo", "pipeline", "plan", *(entry.verb for entry in STAGES.values()), "config", "stack", "schedule", "list"]
SHORT_VERBS = ["promote", "rollback", "lineage", "reproduce", "verify"]
PROGRAM = """
import json, resource, sys
from flows.cli import main
status = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"status": status, "cpu_seconds": used.ru_utime + used.ru_stime, "modules": list(sys.modules)}))
"""


def start(*arguments: str) -> tuple[str, dict]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text, _, last = done.stdout.rstrip().rpartition("\n")
    return text, json.loads(last)


def test_help_is_there_in_half_a_second():
    text, told = start("--help")
    assert told["status"] == 0
    assert [name for name in HEAVY if name in told["modules"]] == []
    assert told["cpu_seconds"] < 0.5
    for verb in [*VERBS, *SHORT_VERBS]:
        assert f"\n  {verb} " in text
    assert start()[0] == text


@pytest.mark.parametrize("verb", [*VERBS, *SHORT_VERBS])
def test_every_verb_explains_itself(verb: str):
    text, told = start(verb, "--help")
    assert told["status"] == 0
    assert "Usage:" in text
    if verb in VERBS[1:-4]:
        assert "--json" in text
        assert ("--set" in text and "--preset" in text) == (verb not in ("export", "prune")), (
            "these read no configuration"
        )
        assert ("--backend" in text) == (verb != "prune"), "it is no job"


def test_settings_are_shown_without_the_heavy_libraries():
    text, told = start("config", "show", "--preset", "digits", "--json")
    assert json.loads(text)["name"] == "digits"
    assert [name for name in HEAVY if name in told["modules"] and name != "pydantic"] == []
    schema = json.loads(start("config", "schema")[0])
    assert schema["$defs"]["TrainingConfig"]["properties"]["batch_size"]["minimum"] == 1


def test_ctrl_c_ends_with_a_sentence_and_its_own_status(monkeypatch, capsys, tmp_path):
    from diffusion_core.catalog import listing
    from flows import cli

    def interrupted(store: str) -> list[dict[str, object]]:
        raise KeyboardInterrupt

    monkeypatch.setitem(listing.KINDS, "runs", interrupted)
    assert cli.main(["list", "runs", "--store", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted; the same command continues the work."


def test_a_store_that_is_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def away(**_: object) -> None:
        raise StoreUnavailable("The store s3://b cannot be reached: http://x answered 503.")

    monkeypatch.setattr(cli, "app", away)
    assert cli.main(["list", "runs"]) == 1
    assert capsys.readouterr().err == "The store s3://b cannot be reached: http://x answered 503.\n"
