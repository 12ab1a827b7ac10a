"""A week in ten minutes: photographs come in day by day, and `make up` does everything by itself, by events and schedules.

`make week` runs it, in about twelve minutes on two idle cores. It works in a clone of this repository's last commit, on CIFAR-10 pictures
in a folder, with the demo's models and a small SAE. What a person does in that week is done through files and commands: photographs are
added and removed, params.yaml is committed, servers are killed and started again. The script never starts a run. It checks each row of
the table that it prints, and draws docs/pictures/week.png (benchmarks/week_picture.py).
"""

import json
import os
import signal
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import yaml
from operations import Clone
from PIL import Image, ImageFilter
from week_picture import RESULT, draw

from ommatid.images.cifar10 import CLASSES
from support.processes import wait_for
from support.servers import free_port
from support.up import ENDED, Receiver, Up, environment, making_up, receiving

NEVER_SEEN = "frog"
USUAL = [kind for kind in CLASSES if kind != NEVER_SEEN]
SMALL = {
    "train.d_sae": "256",
    "train.k": "8",
    "train.batch_size": "512",
    "evaluate.baselines": "[]",
    "label.labellers": "[{kind: vocabulary, words: [imagenet], by: mean}]",
    "intervene.latents": "{kind: best, by: [ms], n: 1}",
    "intervene.doses": "[0, 1]",
    "intervene.n_images": "16",
    "intervene.draws": "3",
    "drift.action": "stop",
    # an SAE of more photographs becomes the champion unless it is worse
    "retrain.min_ms_gain": "-0.05",
    "retrain.max_dead_rise": "0.1",
}
QUIET_SECONDS = 5.0
RUN_SECONDS = 3600.0
"""Seconds after which a run counts as hanging; a busy machine is ten times slower than an idle one."""


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    day: str
    what: str
    starter: str
    """What started the run: an event, the schedule, or nothing."""
    state: str
    decision: str
    message: str
    detail: str
    """What the run said."""


@dataclass
class Week:
    """The week so far."""

    clone: Clone
    receiver: Receiver
    up: Up | None = None
    lines: list[Line] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Runs that have ended, and belong to a row."""
    began: float = field(default_factory=time.time)
    days: list[tuple[str, float]] = field(default_factory=list)
    """Days with the times at which they began."""
    photographs: list[tuple[float, int]] = field(default_factory=list)
    """Times at which photographs came or went, with their number then."""
    faults: list[tuple[str, float, float]] = field(default_factory=list)
    """Servers that were out of order, from when until when."""
    heard: list[float] = field(default_factory=list)
    """Times at which messages had come."""
    n_decisions: int = 0

    @property
    def server(self) -> Up:
        assert self.up is not None
        return self.up

    def begin(self, day: str) -> None:
        """Begin a day."""
        self.days.append((day, time.time()))
        print(f"{day}, after {time.time() - self.began:.0f} s", flush=True)

    def add(self, n: int, kinds: list[str] = USUAL, change: Callable[[bytes], bytes] = bytes) -> list[Path]:
        """Let photographs come in."""
        paths = self.clone.add(n, kinds, change)
        self._count()
        return paths

    def remove(self, paths: list[Path]) -> None:
        """Take photographs away."""
        for path in paths:
            path.unlink()
        self._count()

    def _count(self) -> None:
        self.photographs.append((time.time(), sum(path.is_file() for path in self.clone.photos.rglob("*"))))

    def decisions(self) -> list[dict[str, Any]]:
        """All decisions in the log."""
        path = self.clone.root / "data/published/decisions.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def wait_for_run(self, is_ours: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for the end of the next run that is of a kind; nothing but runs of `retrain` may have started."""

        def find() -> dict[str, Any] | None:
            time.sleep(1)  # as each request is work for the server
            known = {run["id"] for run in self.runs}
            return next((run for run in self.ended_runs() if run["id"] not in known and is_ours(run)), None)

        run = wait_for(find, "the end of a run of retrain", RUN_SECONDS)
        self.runs.append(run)
        return run

    def ended_runs(self) -> list[dict[str, Any]]:
        """All runs of `retrain` that have ended, oldest first, without those that were missed."""
        return self.server.runs("retrain", *ENDED - {"CANCELLED"})

    def tell(self, what: str, run: dict[str, Any] | None, state: str, decision: str = "", message: str = "") -> dict[str, Any] | None:
        """Add a row to the table, after comparing it with what it has to be.

        Args:
            what: What happened.
            run: The run that ended, if any.
            state: State that it should have.
            decision: Decision that should have been logged since the row before, if any.
            message: Subjects of the messages that should have come since then, if any.

        Returns:
            The decision.

        Raises:
            SystemExit: The row is another one.
        """
        if message:
            n_messages = len(message.split(", "))
            wait_for(lambda: len(self.receiver.bodies) >= len(self.heard) + n_messages, f"the message {message!r}")
        came = [body["subject"] for body in self.receiver.bodies[len(self.heard) :]]
        made = self.decisions()[self.n_decisions :]
        said = run["state"] if run else {"name": "no run", "message": ""}
        starter = "" if run is None else "schedule" if run["auto_scheduled"] else "event"
        decided = ", ".join(name_of(one) for one in made)
        found = Line(self.days[-1][0], what, starter, said["name"], decided, ", ".join(came), said["message"] or "")
        print(f"{found.day}: {what}\n  {found.starter} {found.state} | {found.decision} | {found.message} | {found.detail}", flush=True)
        if (found.state, found.decision, found.message) != (state, decision, message):
            raise SystemExit(f"week: the row {found} should have been ({state!r}, {decision!r}, {message!r})")
        self.lines.append(found)
        self.heard += [time.time()] * len(came)
        self.n_decisions += len(made)
        return made[-1] if made else None

    def alias(self) -> str | None:
        """Digest of the SAE that MLflow's registry calls the champion."""
        url = f"{self.server.mlflow}/api/2.0/mlflow/registered-models/alias?name=ommatid-sae&alias=champion"
        with urllib.request.urlopen(url, timeout=60) as answer:
            tags = json.loads(answer.read())["model_version"]["tags"]
        return next((tag["value"] for tag in tags if tag["key"] == "ommatid.sae"), None)

    def ask(self, sql: str) -> list[dict[str, Any]]:
        """Ask the published catalogue."""
        command = ["ommatid", "query", "--catalog", "data/published/catalog.duckdb", "--format", "json", sql]
        return json.loads(self.clone.run(command))

    def warnings(self, run: dict[str, Any]) -> str:
        """What a run has logged as warnings."""
        logs = {"flow_run_id": {"any_": [run["id"]]}, "level": {"ge_": 30}}
        return "\n".join(log["message"] for log in self.server.api.post("/logs/filter", {"logs": logs}))


def name_of(decision: dict[str, Any]) -> str:
    """Name of a decision in the table: champion, challenger, or rollback."""
    return "rollback" if decision["how"] == "rollback" else decision["decision"]


def check(holds: bool, week: Week, what: str) -> None:
    """Check something beside the table."""
    if not holds:
        raise SystemExit(f"week: {week.days[-1][0]}: {what}")


def by_event(run: dict[str, Any]) -> bool:
    return "images changed" in run["tags"]


def by_schedule(run: dict[str, Any]) -> bool:
    return run["auto_scheduled"]


def monday(week: Week) -> None:
    """The first photographs come in."""
    week.begin("Monday")
    week.add(1_000)
    week.tell("1,000 photographs of nine kinds", week.wait_for_run(by_event), "Promoted", "champion", "There is a new champion")
    check(week.alias() == week.decisions()[-1]["challenger"]["digest"], week, "the registry's champion is another one than the log's")


def tuesday(week: Week) -> None:
    """More of the same kinds come in, some of them damaged."""
    week.begin("Tuesday")
    week.add(5, change=cut_off)
    week.add(400)
    run = week.wait_for_run(by_event)
    week.tell("400 more, and 5 files that cannot be read", run, "Promoted", "champion", "There is a new champion")
    report = json.loads((week.clone.root / "data/quality/images.json").read_text(encoding="utf-8"))["summary"]
    check(report["n_rejected"] == 5 and report["n_images"] == 1_400, week, f"the report counts {report}")


def wednesday(week: Week) -> None:
    """Photographs of another kind, through a broken lens; a person takes them away."""
    week.begin("Wednesday")
    bad = week.add(150, [NEVER_SEEN], blur_and_tint)
    week.tell("150 frogs, blurred and tinted", week.wait_for_run(by_event), "Drifted", "", "New images have drifted")
    (found,) = week.ask("SELECT verdict, n_new, auroc FROM drift_checks ORDER BY check_id DESC LIMIT 1")
    check((found["verdict"], found["n_new"]) == ("drift", 150), week, f"the check of drift is {found}")
    changed = week.ask("SELECT latent, label FROM drift WHERE is_changed ORDER BY check_id DESC, rank LIMIT 3")
    check(bool(changed), week, "no feature is named")
    week.remove(bad)
    week.tell("a person takes them away", week.wait_for_run(by_event), "Unchanged")


def thursday(week: Week) -> None:
    """An upload breaks off."""
    week.begin("Thursday")
    bad = week.add(200, change=cut_off)
    week.tell("200 files of an upload that broke off", week.wait_for_run(by_event), "Rejected", "", "A gate rejected a run")
    week.remove(bad)
    week.tell("a person takes them away", week.wait_for_run(by_event), "Unchanged")


def friday(week: Week) -> None:
    """Somebody commits a training that is worse."""
    week.begin("Friday")
    week.clone.set_params({"train.k": "4"})
    week.clone.commit("Let fewer latents fire")
    week.add(60)
    week.tell("train.k: 4 is committed; 60 photographs", week.wait_for_run(by_event), "Kept", "challenger")


def saturday(week: Week) -> None:
    """The Prefect server is killed while a run trains; `make up` ends, and is started again."""
    week.begin("Saturday")
    week.clone.set_params({"train.k": SMALL["train.k"]})
    week.clone.commit("Let as many latents fire as before")
    week.add(100)
    wait_for(lambda: is_training(week), "the training", RUN_SECONDS)
    died = time.time()
    kill("flows.prefect_server", week)
    week.server.heard("error: prefect was killed by SIGKILL")
    check(week.server.process.wait() == 1, week, "make up did not end with an error")
    set_project(week.clone, "*/2 * * * *")
    week.up = None
    week.faults.append(("make up has ended", died, died))


def saturday_again(week: Week) -> None:
    """The run that was killed starts again and continues its work, while MLflow hangs."""
    fault, died, _ = week.faults.pop()
    week.faults.append((fault, died, time.time()))
    before = week.alias()
    with hanging(week, "MLflow hangs", "mlflow"):
        run = week.wait_for_run(by_event)
    what = "k is set back; 100 more; the Prefect server dies in training; make up is started again, MLflow hangs"
    week.tell(what, run, "Promoted", "champion", "A run was cut short and starts again, There is a new champion")
    wait_for(lambda: "the alias champion was not set" in week.warnings(run), "the run to say that the registry was away")
    check(week.alias() == before, week, "the registry knows a champion that was trained while it was away")


def sunday(week: Week) -> None:
    """Nothing comes in; a person returns to the champion before."""
    week.begin("Sunday")
    week.tell("nothing comes in; MLflow is back", week.wait_for_run(by_schedule), "Unchanged")
    check(week.alias() == week.decisions()[-1]["challenger"]["digest"], week, "Saturday's champion did not register itself")
    before = week.decisions()[1]["challenger"]
    week.clone.run(["ommatid", "champion", "rollback", "--why", "a week's trial"])
    made = week.tell("a person rolls back", None, "no run", "rollback")
    check(made is not None and made["challenger"]["digest"] == before["digest"] == week.alias(), week, "this is not Tuesday's champion")
    week.runs = week.ended_runs()  # one may have begun before
    week.tell("still nothing comes in", week.wait_for_run(by_schedule), "Unchanged")
    week.runs = week.ended_runs()
    check(week.alias() == before["digest"], week, "the rollback was undone")


def cut_off(picture: bytes) -> bytes:
    """A file whose upload broke off."""
    return picture[: len(picture) // 2]


def blur_and_tint(picture: bytes) -> bytes:
    """A photograph through a dirty lens, in yellow light."""
    with Image.open(BytesIO(picture)) as image:
        changed = Image.blend(image.convert("RGB").filter(ImageFilter.GaussianBlur(2)), Image.new("RGB", image.size, (220, 170, 40)), 0.4)
    to = BytesIO()
    changed.save(to, "PNG")
    return to.getvalue()


def is_training(week: Week) -> bool:
    """Return whether a run trains."""
    tasks = {"task_runs": {"name": {"any_": ["train"]}, "state": {"type": {"any_": ["RUNNING"]}}}}
    return bool(week.server.api.post("/task_runs/filter", tasks))


@contextmanager
def hanging(week: Week, fault: str, word: str) -> Iterator[None]:
    """Let a server hang until the block ends."""
    began, stopped = time.time(), find_processes(word, week)
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            process.resume()
        week.faults.append((fault, began, time.time()))


def kill(word: str, week: Week) -> None:
    """Kill a server."""
    for process in find_processes(word, week):
        process.send_signal(signal.SIGKILL)


def find_processes(word: str, week: Week) -> list[psutil.Process]:
    """Processes of `make up` whose command has a word in it, with their children, but not the runs of the worker."""
    family = psutil.Process(week.server.process.pid).children()
    (found,) = [process for process in family if any(word in part for part in process.cmdline())]
    return [found, *found.children(recursive=True)]


def set_project(clone: Clone, cron: str | None = None) -> None:
    """Let the watcher of a clone wait for seconds only, and set the schedule of retrain."""
    path = clone.root / "infra/prefect.yaml"
    project = yaml.safe_load(path.read_text(encoding="utf-8"))
    project["watch"]["quiet_seconds"] = QUIET_SECONDS
    (retrain,) = [one for one in project["deployments"] if one["name"] == "retrain"]
    if cron:
        retrain["schedules"][0]["cron"] = cron
    path.write_text(yaml.safe_dump(project), encoding="utf-8")


DAYS = ((monday, tuesday, wednesday, thursday, friday, saturday), (saturday_again, sunday))
"""What happens while `make up` runs, each time that it is started."""


def live(week: Week, env: dict[str, str]) -> None:
    """Live through the days."""
    for days in DAYS:
        with making_up(week.clone.root, env, week.receiver) as week.up:
            for day in days:
                day(week)
    time.sleep(5)  # for a message too many
    check(len(week.receiver.bodies) == len(week.heard), week, f"unexpected messages: {week.receiver.subjects()[len(week.heard) :]}")
    log = [name_of(one) for one in week.decisions()]
    check(log == ["champion", "champion", "challenger", "champion", "rollback"], week, f"the log of decisions is {log}")


def table_of(lines: list[Line]) -> str:
    """The table in Markdown."""
    rows = [("day", "what happens", "started by", "state of the run", "decision", "message"), ("---",) * 6]
    days = [line.day if i == 0 or lines[i - 1].day != line.day else "" for i, line in enumerate(lines)]
    rows += [(day, line.what, line.starter, line.state, line.decision, line.message) for day, line in zip(days, lines, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tell_story(week: Week) -> dict[str, Any]:
    """Return what the picture is made of, as arguments of `draw`."""
    runs = [
        {key: run[key] for key in ("start_time", "end_time", "auto_scheduled")} | {"state": {"name": run["state"]["name"]}}
        for run in week.runs
    ]
    decisions = [
        {key: made[key] for key in ("decided_at", "decision", "how", "reason")} | {"challenger": {"digest": made["challenger"]["digest"]}}
        for made in week.decisions()
    ]
    story = {"days": week.days, "photographs": week.photographs, "runs": runs, "messages": week.heard, "decisions": decisions}
    return {**story, "faults": week.faults, "end": time.time()}


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"), prefix="week-") as folder, receiving() as receiver:
        root = Path(folder)
        clone = Clone(root, 0, SMALL)
        set_project(clone)
        clone.commit("Wait for seconds")
        week = Week(clone, receiver)
        port = str(free_port())
        clone.env["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"  # or runs would write to its database without asking it
        env = {**environment(root), "OMMATID_CACHE": str(clone.cache), "PYTHONPATH": str(clone.root / "src"), "MLFLOW_PORT": port}
        env["MLFLOW_TRACKING_URI"] = clone.env["MLFLOW_TRACKING_URI"]
        live(week, env)
        print(f"\n{table_of(week.lines)}\n\n{(time.time() - week.began) / 60:.0f} minutes")
        story = tell_story(week)
        RESULT.write_text(json.dumps(story, indent=1) + "\n", encoding="utf-8")
        draw(**story)


if __name__ == "__main__":
    main()
