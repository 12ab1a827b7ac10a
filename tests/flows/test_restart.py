"""`make up` that ends while a run is in the middle of a stage, and is started again."""

import shutil
from pathlib import Path

import psutil
import yaml

from support.checkout import REPOSITORY, run
from support.processes import wait_for, wait_for_end
from support.up import Up, environment, making_up, receiving


def test_a_run_that_ctrl_c_cuts_short_starts_again_and_the_second_time_crashes(made: Path, tmp_path: Path) -> None:
    """The second time, `make up` is killed, and started again at once."""
    checkout = tmp_path / "checkout"
    shutil.copytree(made, checkout, symlinks=True)
    for name in ("flows", "infra"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    project = yaml.safe_load((checkout / "infra/prefect.yaml").read_text())
    project["deployments"] = [one for one in project["deployments"] if one["name"] == "pipeline"]
    del project["watch"]
    (checkout / "infra/prefect.yaml").write_text(yaml.safe_dump(project))
    (checkout / "src/train.py").write_text("new = True\n")
    run(checkout, "git", "add", "-A")
    run(checkout, "git", "commit", "-qm", "Flows")
    env = environment(tmp_path)
    with receiving() as receiver:
        with making_up(checkout, env, receiver) as up:
            flow_run = up.start("pipeline")
            stage = training(up)
        wait_for_end([stage], "the stage")

        with making_up(checkout, env, receiver) as up:
            name = up.api.get(f"/flow_runs/{flow_run}")["name"]
            assert f"{name} was cut short: its worker ended; it starts again" in up.heard("cut short")
            stage = training(up)
            wait_for(lambda: receiver.subjects() == ["A run was cut short and starts again"], "the message, and no other")
            up.process.kill()
            up.process.wait()

        ports = {"PREFECT_SERVER_API_PORT": up.prefect.rpartition(":")[2], "MLFLOW_PORT": up.mlflow.rpartition(":")[2]}
        with making_up(checkout, env | ports, receiver) as again:
            assert (again.prefect, again.mlflow) == (up.prefect, up.mlflow) and again.api.get("/health") is True, "at the same addresses"
            up = again
            wait_for_end([stage], "the stage")
            assert f"warning: {name} is marked as crashed: its worker ended for the second time" in up.heard("for the second time")
            wait_for(lambda: receiver.subjects()[1:] == ["A run failed"], "the message")
            (checkout / "hold").unlink()
            up.api.set_state(flow_run, "SCHEDULED", "as Retry does", "AwaitingRetry")
            wait_for(lambda: up.api.get(f"/flow_runs/{flow_run}")["state_type"] == "COMPLETED", "the end of the retry")
    assert (checkout / "ran.log").read_text().splitlines()[-1].startswith("train ")


def training(up: Up) -> psutil.Process:
    """Wait until a run trains, and return the stage, which goes on as long as there is a file `hold`."""
    hold = up.checkout / "hold"
    hold.write_text("")
    return psutil.Process(int(wait_for(hold.read_text, "the stage")))
