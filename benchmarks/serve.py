"""Benchmark of the explorer: `ommatid serve` over a catalogue of 65,536 latents, asked for pages by eight clients at once.

python benchmarks/serve.py                  writes benchmarks/results/serve.json; makes the catalogue in .bench/serve the first time
python benchmarks/serve.py feature image    measures these kinds of page only, and writes nothing
The clients are coroutines of one process, which keeps connections alive, does not parse pages, and runs on the same cores as the server:
its share of the processor time is printed. Latency is from sending a request to the last byte of the answer. Every kind of page is asked
for with random parameters, drawn with a seed. Memory is the proportional and the resident set size (PSS, RSS) of the server and all its
child processes, summed.
"""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from html import unescape
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import quote, urlencode

import duckdb
from report import Row, publish, show
from serve_catalog import N_EVAL, SAES, catalogue

CLIENTS = 8
FEWER = {"sql": 2}
"""Clients of a kind of page that refuses more statements at once."""
SECONDS = 8.0
"""Seconds for which each kind of page is asked for."""
WARMED = 2
"""Requests of each client that are not counted."""
CACHE = Path(__file__).parent.parent / ".bench" / "serve"
SAE, OTHER = (size.sae for size in SAES)
N_LATENTS = SAES[0].d_sae
SORTS = ("over_floor", "ms", "label_score", "over_control", "density", "n_images", "purity", "uniqueness", "label", "latent")
FILTERS = (
    lambda rng: {"ms_min": f"{rng.uniform(0.2, 0.7):.2f}"},
    lambda rng: {"density_max": f"{10 ** rng.uniform(-4, -1):.5f}"},
    lambda rng: {"images_min": rng.choice([16, 64, 256])},
    lambda rng: {"over_control": f"{rng.uniform(0, 0.3):.2f}"},
    lambda rng: {"class": rng.choice(Facts.classes)},
    lambda rng: {"label": rng.choice(Facts.words)},
    lambda rng: {"state": rng.choice(["live", "dense", "rare", "duplicate", "doubtful"])},
    lambda rng: {},
)
"""Makers of random filters of the list of features."""
KINDS = ("kept", "split", "changed", "lost", "new")
"""Kinds of features that two compared SAEs have."""
STATEMENTS = (
    "SELECT latent, label, ms FROM features WHERE ms > {x:.3f} ORDER BY ms LIMIT 100",
    "SELECT label, count(*) AS n FROM features WHERE density < {x:.4f} GROUP BY label ORDER BY n DESC LIMIT 50",
    "SELECT * FROM neighbours WHERE latent = {latent}",
    "SELECT count(*) FROM firings WHERE latent = {latent}",
)


class Facts:
    """What is in the catalogue, for random addresses."""

    classes: list[str]
    words: list[str]
    hashes: list[str]
    """Beginning of each evaluation image's checksum."""


def features(rng: random.Random) -> str:
    values = {"sort": rng.choice(SORTS), "order": rng.choice(["asc", "desc"]), **rng.choice(FILTERS)(rng), **rng.choice(FILTERS)(rng)}
    return "/features?" + urlencode(values)


def statement(rng: random.Random) -> str:
    sql = rng.choice(STATEMENTS).format(x=rng.random(), latent=rng.randrange(N_LATENTS))
    return "/sql?" + urlencode({"q": sql})


def thumbnail(rng: random.Random) -> str:
    image = rng.randrange(N_EVAL)
    return f"/thumbs/{image}/{Facts.hashes[image]}.webp"


PAGES: dict[str, Callable[[random.Random], str]] = {
    "start": lambda rng: "/",
    "features": features,
    "features as a table": lambda rng: features(rng) + "&view=table",
    "feature": lambda rng: f"/features/{SAE}/{rng.randrange(N_LATENTS)}",
    "image": lambda rng: f"/images/{rng.randrange(N_EVAL)}",
    "classes": lambda rng: f"/classes?page={rng.randrange(1, 10)}",
    "class": lambda rng: f"/class?name={quote(rng.choice(Facts.classes))}",
    "search by words": lambda rng: f"/search?q={quote(rng.choice(Facts.words))}",
    "compare": lambda rng: f"/compare?a={SAE}&b={OTHER}&kind={rng.choice(KINDS)}",
    "runs": lambda rng: "/runs",
    "sql": statement,
    "thumbnail": thumbnail,
}
"""Addresses by kind of page."""
BYTES = {"feature": (150_000, 60_000), "start": (200_000, 60_000)}
"""Bytes of a page that must not be exceeded, and the goal."""
FOLLOWED = 3
"""Pages that are followed by the link to the next one."""
NEXT = re.compile(rb'rel="next" href="([^"]+)"')


class Client:
    """An HTTP/1.1 client on one connection that is kept alive."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of a page."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        reader, writer = self._streams
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        headers = head.lower()
        if found := re.search(rb"content-length: (\d+)", headers):
            body = await reader.readexactly(int(found[1]))
        else:
            body = b"".join([chunk async for chunk in _chunks(reader)])
        if b"connection: close" in headers:
            self.close()
        return status, body

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


async def ask(port: int, kind: str) -> tuple[list[float], list[int]]:
    """Ask for pages of a kind by all clients at once; return the seconds of each answer and the bytes of each body."""
    took: list[float] = []
    sizes: list[int] = []
    end = time.perf_counter() + SECONDS

    async def run(number: int) -> None:
        rng, client, left, path, done = random.Random(f"{kind} {number}"), Client(port), 0, "", 0
        while time.perf_counter() < end:
            if not left:
                path, left = PAGES[kind](rng), FOLLOWED
            start = time.perf_counter()
            status, body = await client.get(path)
            seconds = time.perf_counter() - start
            if status != 200:
                raise SystemExit(f"{path}: status {status}: {body[:2000]!r}")
            done += 1
            if done > WARMED:
                took.append(seconds)
                sizes.append(len(body))
            found = NEXT.search(body) if kind.startswith("features") else None
            left = left - 1 if found else 0
            path = unescape(found[1].decode()) if found else ""
        client.close()

    await asyncio.gather(*(run(number) for number in range(FEWER.get(kind, CLIENTS))))
    return took, sizes


def memory(pid: int) -> tuple[float, float]:
    """Return the PSS and the RSS of a process and all its descendants, summed, in MB."""
    pss = rss = 0
    for process in family(pid):
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
        except (FileNotFoundError, ProcessLookupError):
            continue
        pss, rss = pss + int(lines["Pss"].split()[0]), rss + int(lines["Rss"].split()[0])
    return pss / 1024, rss / 1024


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants so far, those that have ended included."""
    ticks = 0
    for process in family(pid):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> Iterator[int]:
    """Iterate over a process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


class Server:
    """`ommatid serve` on a free port, and what its start took."""

    def __init__(self, file: Path) -> None:
        start = time.perf_counter()
        command = [sys.executable, "-m", "ommatid", "serve", "--catalog", str(file), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if not found:
            raise SystemExit(f"ommatid serve has not started: {line!r}")
        self.port = int(found[1])
        self.listening = time.perf_counter() - start
        status, _ = asyncio.run(Client(self.port).get("/"))
        assert status == 200, status
        self.answered = time.perf_counter() - start

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def read_facts(file: Path) -> None:
    with duckdb.connect(str(file), read_only=True) as connection:
        labels = "SELECT DISTINCT label FROM images WHERE label IS NOT NULL ORDER BY label"
        Facts.classes = [row[0] for row in connection.execute(labels).fetchall()]
        rows = connection.execute("SELECT left(image_id, 12) FROM images WHERE split = 'eval' ORDER BY image").fetchall()
        Facts.hashes = [row[0] for row in rows]
    Facts.words = sorted({word for label in Facts.classes for word in label.split() if len(word) > 3})


def starts(file: Path, n: int = 5) -> tuple[float, float, float]:
    """Median seconds from start to listening and to the first answered page, and PSS in MB after that page."""
    found = []
    for _ in range(n):
        server = Server(file)
        found.append((server.listening, server.answered, memory(server.process.pid)[0]))
        server.end()
    listening, answered, held = (median(values) for values in zip(*found, strict=True))
    return listening, answered, held


def measure(server: Server, kind: str) -> tuple[list[Row], float]:
    """Measure a kind of page; return its rows and the share of the processor time that the clients took."""
    used, before, start = processor_seconds(server.process.pid), time.process_time(), time.perf_counter()
    took, sizes = asyncio.run(ask(server.port, kind))
    seconds = time.perf_counter() - start
    used = (processor_seconds(server.process.pid) - used) / (len(took) + WARMED * FEWER.get(kind, CLIENTS))
    share = (time.process_time() - before) / seconds
    at = quantiles(took, n=100) if len(took) > 1 else took * 99
    must, goal = BYTES.get(kind, (None, None))
    rows = [
        Row(f"{kind}: p50", at[49] * 1e3, "ms", better="lower"),
        Row(f"{kind}: p95", at[94] * 1e3, "ms", must=100, goal=50, better="lower"),
        Row(f"{kind}: p99", at[98] * 1e3, "ms", better="lower"),
        Row(f"{kind}: requests", len(took) / seconds, "/s"),
        Row(f"{kind}: processor time of the server for a page", used * 1e3, "ms", better="lower"),
        Row(f"{kind}: largest page", max(sizes), "bytes", must=must, goal=goal, better="lower"),
    ]
    print(f"{kind}: " + ", ".join(f"{row.what.split(': ')[1]} {row.value:,.1f}" for row in rows), flush=True)
    return rows, share


def main() -> None:
    kinds = sys.argv[1:] or list(PAGES)
    if unknown := [kind for kind in kinds if kind not in PAGES]:
        raise SystemExit(f"{', '.join(unknown)}: expected one of {', '.join(PAGES)}")
    file = catalogue(CACHE)
    read_facts(file)
    listening, answered, held = starts(file)
    rows = [
        Row("start to listening", listening, "s", better="lower"),
        Row("start to the first answered page", answered, "s", must=1.5, goal=0.7, better="lower"),
        Row("memory after the first page, PSS", held, "MB", better="lower"),
    ]
    server = Server(file)
    try:
        shares, peak = [], 0.0
        for kind in kinds:
            measured, share = measure(server, kind)
            rows += measured
            shares.append(share)
            peak = max(peak, memory(server.process.pid)[0])
        pss, rss = memory(server.process.pid)
    finally:
        server.end()
    rows += [
        Row("memory after each kind of page, highest PSS", peak, "MB", must=400, goal=250, better="lower"),
        Row("memory at the end, RSS", rss, "MB", better="lower"),
    ]
    notes = [
        f"{CLIENTS} clients at once in one process on the server's {os.cpu_count()} cores, of which it took {median(shares):.0%} of one",
        f"catalogue of {file.stat().st_size / 1e6:,.0f} MB; PSS at the end {pss:.0f} MB; the model's worker was not started",
    ]
    if sys.argv[1:]:
        show(rows, notes)
    else:
        publish("serve", rows, ["ommatid", "duckdb", "fastapi", "uvicorn", "jinja2"], notes)


if __name__ == "__main__":
    main()
