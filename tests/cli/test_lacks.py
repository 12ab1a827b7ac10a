"""Proves that a lack of disk space, memory or files is reported by its cause, whichever library met it, with the stage and what helps."""

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ommatid.cli.error_boundary import at_edge
from ommatid.config import load_params
from ommatid.errors import ArtefactError, Lack, MachineError, find_lack
from ommatid.events import ignore
from ommatid.pipeline import STAGES, run
from ommatid.store.filesystem import writing


def lacks_in(tmp_path: Path, body: str) -> dict[str, str]:
    """Run `body`, which calls try_(name, function), in a separate process, because its limits cannot be lifted, and return its errors."""
    script = textwrap.dedent("""
        import json, resource, sys
        import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq, sqlite3, torch
        from PIL import Image
        from safetensors.torch import save_file
        from ommatid.errors import find_lack

        found = {}
        def try_(name, function, *args):
            try:
                function(*args)
            except BaseException as error:
                lack = find_lack(error)
                found[name] = lack.name if lack else repr(error)
    """)
    script += textwrap.dedent(body) + "\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_errors_of_every_library_that_writes_are_recognised(tmp_path: Path) -> None:
    found = lacks_in(
        tmp_path,
        """
        table = pa.table({"x": np.random.rand(20_000)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        def duck(path):
            with duckdb.connect(path) as connection:
                connection.execute("CREATE TABLE t AS SELECT random() FROM range(100000)")
        def sqlite(path):
            with sqlite3.connect(path) as connection:
                connection.execute("CREATE TABLE t AS SELECT zeroblob(200000)")
        noise = np.random.randint(0, 255, (200, 200, 3), np.uint8)
        try_("safetensors", save_file, {"x": torch.rand(50_000)}, "a.safetensors")
        try_("duckdb", duck, "a.duckdb")
        try_("sqlite", sqlite, "a.sqlite")
        try_("parquet", pq.write_table, table, "a.parquet")
        try_("spill", lambda: pa.ipc.new_file("a.arrow", table.schema).write_table(table))
        try_("pictures", lambda: Image.fromarray(noise).save("a.png"))
        try_("numpy", lambda: np.save("a.npy", np.zeros(50_000)))
        try_("torch", torch.save, torch.rand(50_000), "a.pt")
        try_("text", lambda: open("a.json", "w").write("x" * 100_000))
        """,
    )
    too_large = dict.fromkeys(("safetensors", "duckdb", "parquet", "spill", "pictures", "text"), "FILE_SIZE")
    assert found == too_large | {"sqlite": "DISK", "numpy": "SPACE", "torch": "SPACE"}


def test_out_of_memory_errors_of_every_library_are_recognised(tmp_path: Path) -> None:
    found = lacks_in(
        tmp_path,
        """
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        import threading, time
        def threads():
            for _ in range(200):
                threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        def duck(limit):
            with duckdb.connect(config={"memory_limit": limit, "threads": 1}) as connection:
                connection.execute("SELECT list(i) FROM range(100000000) t(i)").fetchall()
        try_("torch", torch.empty, 10**9)
        try_("numpy", np.empty, 10**9)
        try_("python", bytes, 10**9)
        try_("arrow", pa.allocate_buffer, 10**9)
        try_("duckdb's limit", duck, "30MB")
        try_("duckdb", duck, "8GB")
        try_("threads", threads)
        """,
    )
    assert found == dict.fromkeys(("torch", "numpy", "python", "arrow", "duckdb's limit", "duckdb"), "MEMORY") | {"threads": "THREADS"}


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
            Lack.DEVICE_MEMORY,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Lack.DEVICE_MEMORY),
        (ImportError("scipy/linalg/cython_lapack.so: failed to map segment from shared object"), Lack.MEMORY),
        (OSError(errno.EMFILE, "Too many open files"), Lack.FILES),
        (OSError(errno.EIO, "Input/output error"), Lack.DISK),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Lack.QUOTA),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("No space left on device is a fine title"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (ArtefactError("x: the disk is full (1 MB free)"), None),
    ],
)
def test_the_cause_is_found_behind_other_errors(error: Exception, lack: Lack | None) -> None:
    assert find_lack(error) is lack
    try:
        raise KeyError("b") from error
    except KeyError as other:
        assert find_lack(other) is lack
    assert find_lack(ExceptionGroup("several", [ValueError("a"), error])) is lack


@pytest.mark.parametrize("name", STAGES)
def test_the_error_names_the_stage_and_what_helps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
        )

    monkeypatch.setattr(run, "open_inputs", fail)
    with pytest.raises(MachineError, match=rf"^{name}: there is not enough memory \(.*DefaultCPUAllocator") as said:
        run.run_stage(name, load_params(), ignore)
    assert (STAGES[name].memory_advice or "use less of it") in str(said.value) and "run the stage again" in str(said.value)


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        """An error that is not an OSError."""

    with (
        pytest.raises(ArtefactError, match=r"sae.safetensors: the disk is full \([\d.]+ [MG]B free\); make room and run the stage again"),
        writing(tmp_path / "sae.safetensors"),
    ):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), writing(tmp_path):
        raise SafetensorError("InvalidHeader")


def test_verbs_that_are_not_stages_report_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, at_edge():
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(
        "error: the disk is full; make room (OSError: [Errno 28] No space left on device: 'report.html')"
    )
