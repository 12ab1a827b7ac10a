"""The servers of `make up`: Prefect with the deployments of infra/prefect.yaml and their workers, MLflow and the explorer, until Ctrl-C.

Everything that they write stays in the checkout, in .prefect and .mlflow, and people's reviews in data. PREFECT_SERVER_API_PORT,
MLFLOW_PORT and OMMATID_PORT set the ports (default: 4200, 5000 and 8321, or the next free ones). While they run, faults of the servers
are looked for (flows/monitor.py), and the forms in the Prefect UI follow params.yaml. Imports no Prefect: each server is a separate
process that logs to .prefect/logs.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from flows.commands import take_no_arguments
from flows.monitor import LOOK_SECONDS, Monitor, skip_missed_runs
from flows.prefect_api import RESTARTED, Api
from flows.processes import LAST_PORT, POLICY, Services, Tail, hold_port
from flows.project import PROJECT, read_project, takes_params
from flows.watch import LOCALHOST, NOTICE, WEBHOOK_HOST
from ommatid.cli.error_boundary import at_edge
from ommatid.compute.commands import environment
from ommatid.config import Params, load_params
from ommatid.errors import ConfigError, RunError
from ommatid.sources.stage import place_of_input
from ommatid.tracking import follow_move

PORTS = {"PREFECT_SERVER_API_PORT": 4200, "MLFLOW_PORT": 5000, "OMMATID_PORT": 8321, "OMMATID_WEBHOOK_PORT": 8322}
"""Environment variables that set the first port to try of the Prefect server, MLflow, the explorer and the webhook, and their defaults."""

ANSWER_SECONDS = 20.0
"""Seconds after which the Prefect server counts as one that does not answer; meanwhile nothing else is looked after."""


def serve(checkout: Path) -> None:
    """Start the servers, deployments and workers, print the addresses, and run until a signal comes or one of the processes ends."""
    params = load_params(checkout / "params.yaml")
    project = read_project(checkout)
    pools = list(dict.fromkeys(deployment.work_pool.name for deployment in project.deployments))
    forms = [deployment.name for deployment in project.deployments if takes_params(checkout, deployment)]
    logs = checkout / ".prefect/logs"
    mark = f"make up in {checkout.resolve()}"
    with _only_one(checkout, Services({}, logs, mark)) as holder, _held_ports() as (prefect, mlflow, explorer, webhook):
        holder.write_text(f"process {os.getpid()}, http://127.0.0.1:{prefect}\n", encoding="utf-8")
        api = Api(f"http://127.0.0.1:{prefect}/api", ANSWER_SECONDS)
        services = Services(_environment(checkout, prefect, explorer, webhook), logs, mark)
        try:
            services.start("prefect", *_prefect(prefect))
            services.start("mlflow", *_mlflow(checkout, mlflow))
            services.start("explorer", "ommatid", "serve", "--port", str(explorer))
            services.wait_for("prefect", f"{api.url}/health")
            monitor = Monitor(api, logs, pools)
            for pool in pools:
                services.start(f"pool-{pool}", "prefect", "work-pool", "create", pool, "--type", "process", "--overwrite")
            services.start("messages", "flows.messages")  # before the deployments, whose runs they are about
            services.finish(*(f"pool-{pool}" for pool in pools), "messages")
            services.start("deploy", "prefect", "--no-prompt", "deploy", "--prefect-file", PROJECT, "--all")
            services.finish("deploy")
            services.wait_for("mlflow", f"http://127.0.0.1:{mlflow}/health")
            services.wait_for("explorer", f"http://127.0.0.1:{explorer}/robots.txt")  # /health says whether there is a catalogue
            restarted = _restart_orphans(api)
            for pool in pools:
                services.start(f"worker-{pool}", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", pool)
            if project.watch:
                services.start("watch", "flows.watch")
            print(
                f"Explorer http://127.0.0.1:{explorer}\nPrefect  http://127.0.0.1:{prefect}/deployments\nMLflow   http://127.0.0.1:{mlflow}"
            )
            if project.watch:
                print(f"Images   {place_of_input(params)} (when they change, {project.watch.deployment} starts)")
            if project.watch and os.environ.get("OMMATID_WEBHOOK_TOKEN"):
                print(f"Webhook  http://{os.environ.get(WEBHOOK_HOST) or LOCALHOST}:{webhook}")
            print("Ctrl-C ends all of them.", flush=True)
            _say(restarted)
            _follow(services, api, monitor, Tail(logs / "watch.log"), checkout / "params.yaml", forms)
        finally:
            services.end()


@contextmanager
def _held_ports() -> Iterator[list[int]]:
    """Keep a free port for each server, which other checkouts do not take.

    Raises:
        ConfigError: A variable is set to something else than a port.
        RunError: No port is free.
    """
    with ExitStack() as stack:
        found: list[int] = []
        for variable, usual in PORTS.items():
            value = os.environ.get(variable) or str(usual)
            if not value.isdecimal() or not 1 <= int(value) <= LAST_PORT:
                raise ConfigError(f"{variable}: got {value!r}; set it to a port from 1 to {LAST_PORT}, or unset it to use {usual}")
            port, holder = hold_port(int(value))
            stack.enter_context(holder)
            found.append(port)
        yield found


def _follow(services: Services, api: Api, monitor: Monitor, watch: Tail, params: Path, forms: Sequence[str]) -> None:
    """Look after the servers until one of the processes ends."""
    shown, next_look = _stamp(params), time.monotonic() + LOOK_SECONDS
    while True:
        services.check()
        if (stamp := _stamp(params)) != shown:
            shown = stamp
            _say(_refresh_forms(api, params, forms))
        _say([line.removeprefix(NOTICE) for line in watch.read().splitlines() if line.startswith(NOTICE)])
        if time.monotonic() >= next_look:
            _say(monitor.look())
            with suppress(RunError):  # the monitor reports it
                _say(skip_missed_runs(api))
            next_look = time.monotonic() + LOOK_SECONDS
        time.sleep(1)


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # an editor may remove the file before it writes the new one
        return None
    return status.st_mtime_ns, status.st_size


def _refresh_forms(api: Api, path: Path, forms: Sequence[str]) -> list[str]:
    """Show the values of params.yaml in the forms of the Prefect UI; return a warning if that fails."""
    try:
        show_params(api, load_params(path), forms)
    except (ConfigError, RunError) as error:
        return [f"warning: the forms in the Prefect UI still show the params of before, and a run that starts now fails: {error}"]
    return []


def show_params(api: Api, params: Params, forms: Sequence[str]) -> None:
    """Set the values that the forms of some deployments show at first.

    They are only shown: a run whose form is not changed gets no parameters, and reads params.yaml when it starts.
    """
    for deployment in api.deployments(*forms) if forms else []:
        schema = deployment["parameter_openapi_schema"]
        schema["properties"]["params"]["default"] = params.model_dump(mode="json")
        api.patch(f"/deployments/{deployment['id']}", {"parameter_openapi_schema": schema, "parameters": {}})


@contextmanager
def _only_one(checkout: Path, earlier: Services) -> Iterator[Path]:
    """Hold the checkout's servers for this process, once those that a killed one left have ended; yield the file that says who holds them.

    Raises:
        RunError: Another process holds them: two schedulers and two workers would share one database.
    """
    folder = checkout / ".prefect"
    folder.mkdir(exist_ok=True)
    lock, holder = filelock.FileLock(folder / "up.lock"), folder / "up.txt"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        other = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise RunError(f"`make up` runs in this checkout already ({other}); use its servers, or end it by Ctrl-C there first") from None
    with lock:
        if earlier.any_left():
            _say(["processes of an earlier `make up` are still there; this one begins when they have ended, within a minute"])
            earlier.end()
        yield holder


def _environment(checkout: Path, port: int, explorer: int, webhook: int) -> dict[str, str]:
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")])),  # for `import flows`
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_UI_URL": os.environ.get("PREFECT_UI_URL") or f"http://127.0.0.1:{port}",  # for links in messages
        "PREFECT_SERVER_UI_API_URL": "/api",  # or the pages in the browser send their requests to port 4200
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS") or "2",  # a run starts soon after Quick run
        "OMMATID_EXPLORER_URL": f"http://127.0.0.1:{explorer}",  # for links to it from Prefect's artifacts and MLflow's tags
        "OMMATID_WEBHOOK_PORT": str(webhook),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {**environment(checkout, checkout), **ours}


def _prefect(port: int) -> tuple[str, ...]:
    """Command that starts the Prefect server."""
    create = ("uvicorn", "--factory", "flows.prefect_server:create_app", "--log-level", "warning")
    return (*create, "--host", "127.0.0.1", "--port", str(port), "--timeout-keep-alive", "5")


def _mlflow(checkout: Path, port: int) -> tuple[str, ...]:
    """Command that starts MLflow on the store of this checkout's runs."""
    folder = checkout / ".mlflow"
    folder.mkdir(exist_ok=True)
    follow_move(folder)
    store = ("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--default-artifact-root", (folder / "artifacts").as_uri())
    # pages without data would show videos of another host
    policy = ("--uvicorn-opts", f'--header "Content-Security-Policy:{POLICY}"')
    return ("mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port), *policy, *store)


def _restart_orphans(api: Api) -> list[str]:
    """Start runs again that have lost their worker: they still report Running, and would count towards the concurrency limit.

    A run that is cut short after it was started again in this way is left as Crashed, as it may be what brings the machine down.

    Returns:
        A sentence for each run that had begun.
    """
    said = []
    for run in api.runs(state={"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}, deployment_id={"is_null_": False}):
        if run["state_type"] == "CANCELLING":
            what = "its worker ended while it was being cancelled"
            api.set_state(run["id"], "CANCELLED", what)
            said.append(f"{run['name']} is cancelled: {what}")
        elif run["state_type"] == "PENDING":
            api.set_state(run["id"], "SCHEDULED", "its worker ended before it had begun")
        elif _was_restarted(api, run["id"]):
            what = "its worker ended for the second time; start the same run again to continue where it stopped"
            api.set_state(run["id"], "CRASHED", what)
            said.append(f"warning: {run['name']} is marked as crashed: {what}")
        else:
            what = "its worker ended; it starts again and continues where it stopped"
            api.set_state(run["id"], "SCHEDULED", what, RESTARTED)
            said.append(f"{run['name']} was cut short: {what}")
    return said


def _was_restarted(api: Api, run: str) -> bool:
    """Return whether it was `_restart_orphans` that last started a run, and not a schedule, a person, or the answer to a question."""
    starts = [
        state["name"]
        for state in api.get(f"/flow_run_states/?flow_run_id={run}")
        if state["type"] in ("SCHEDULED", "PAUSED") and state["name"] not in ("AwaitingConcurrencySlot", "Late")
    ]
    return starts[-1:] == [RESTARTED]


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the servers until Ctrl-C, SIGTERM, or SIGHUP when the terminal is closed."""
    take_no_arguments("flows.serve", __doc__)
    with at_edge():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _stop)
        try:
            serve(Path.cwd())
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
