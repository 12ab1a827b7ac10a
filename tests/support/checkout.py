"""A checkout like a user's, with real git and real DVC, whose stages are three small scripts."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ommatid.compute.commands import environment

REPOSITORY = Path(__file__).parents[2]

DVC_YAML = """\
# not in order of need on purpose
stages:
  evaluate:
    cmd: python fake.py evaluate
    params: [evaluate]
    deps: [data/sae, data/images]
    outs: [data/evaluation, data/quality/evaluate.html]
    metrics: [data/quality/evaluate.json]
  train:
    cmd: python fake.py train
    params: [train]
    deps: [data/images, src/train.py]
    outs: [data/sae, data/quality/train.html, data/quality/health]
    metrics: [data/quality/train.json]
  sources:
    cmd: ommatid sources
    always_changed: true
    outs: [data/sources/images.json: {persist: true}]
  images:
    cmd: python fake.py images
    params: [images]
    deps: [data/sources/images.json]
    outs: [data/images, data/quality/images.html]
    metrics: [data/quality/images.json]
"""

FAKE = """\
import json, os, pathlib, sys, time, yaml
name = sys.argv[1]
place = {"images": "images", "train": "sae", "evaluate": "evaluation"}[name]
params = yaml.safe_load(open("params.yaml"))
out = pathlib.Path("data") / place
for i in range(1, 4):
    print(f"{name} things: {i} of 3")
hold = pathlib.Path(os.environ.get("OMMATID_CHECKOUT", "."), "hold")
while name == "train" and hold.exists():
    hold.write_text(str(os.getpid()))
    time.sleep(0.1)
if name == "train" and params["train"]["k"] == 13:
    sys.exit("error: train: 13 is unlucky")
out.mkdir(parents=True)
seen = sorted(p.name for p in pathlib.Path(params["images"]["source"]["path"]).iterdir()) if name == "images" else []
(out / "out.json").write_text(json.dumps([params[name], seen]))
report = {"success": True, "summary": {"fvu": 0.5 - params["train"]["k"] / 1000}, "checks": [
    {"name": "is | there", "reason": "or nothing works", "success": True, "observed": "3", "detail": ""}]}
quality = pathlib.Path("data/quality")
quality.mkdir(exist_ok=True)
(quality / f"{name}.json").write_text(json.dumps(report))
(quality / f"{name}.html").write_text("<p>fine")
if name == "train":
    (quality / "health").mkdir()
    (quality / "health/topk.png").write_bytes(b"picture")
pathlib.Path(os.environ.get("OMMATID_CHECKOUT", ".")).joinpath("ran.log").open("a").write(
    " ".join([name, os.environ.get("OMMATID_EXPERIMENT", "-"), os.environ.get("OMMATID_FLOW_RUN", "-")]) + "\\n")
"""

SOMEBODY = {f"GIT_{role}_{key}": "a@localhost" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}

GITIGNORE = "/data/?*\n!/data/published.dvc\n/photos/\n/ran.log\n/hold\n/.worktrees/\n/.prefect/\n/.mlflow/\n__pycache__/\n"


def run(root: Path, *command: str) -> str:
    """Run git or DVC in a checkout, with a name and an email address for commits."""
    command = (sys.executable, "-m", *command) if command[0] == "dvc" else command
    return subprocess.run(command, cwd=root, env={**environment(root, root), **SOMEBODY}, check=True, capture_output=True, text=True).stdout


def bytes_of(checkout: Path) -> dict[str, str]:
    """Return the content and the inode of each of the user's files."""
    tools = {".git", ".worktrees", ".prefect", ".mlflow", "ran.log"}
    files = [p for p in checkout.rglob("*") if p.is_file() and p.relative_to(checkout).parts[0] not in tools]
    files = [p for p in files if p.relative_to(checkout).parts[:2] not in {(".dvc", "cache"), (".dvc", "tmp")} and p.suffix != ".pyc"]
    return {str(p.relative_to(checkout)): f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.stat().st_ino}" for p in files}


def make_checkout(root: Path) -> Path:
    """Make a checkout with one commit."""
    (root / "photos").mkdir(parents=True)
    (root / "photos/one.jpg").write_text("one")
    (root / "src").mkdir()
    (root / "src/train.py").write_text("pass\n")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "fake.py").write_text(FAKE)
    (root / ".gitignore").write_text(GITIGNORE)
    params = (REPOSITORY / "params.yaml").read_text().replace("{kind: cifar10, path: data/cifar10.json}", "{kind: folder, path: photos}")
    assert "path: photos}   #" in params
    (root / "params.yaml").write_text(re.sub(r"^  k: \d+", "  k: 32", params, flags=re.MULTILINE))  # whatever the default is
    shutil.copytree(REPOSITORY / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    shutil.copyfile(REPOSITORY / ".dvcignore", root / ".dvcignore")
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "Begin")
    return root
