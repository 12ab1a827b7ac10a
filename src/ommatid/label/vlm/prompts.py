"""The words of a question: files beside this package, each with sections below `# headings`."""

import re
from functools import cache
from importlib.resources import files
from string import Template


@cache
def load_prompt(name: str) -> dict[str, Template]:
    """The sections of `prompts/<name>.md` by heading; `$n` and the like are to be filled in."""
    text = (files("ommatid.label") / "prompts" / f"{name}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# (\w+)$", text, flags=re.MULTILINE)
    return {heading: Template(body.strip()) for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def words_of(prompt: dict[str, Template]) -> str:
    """All of a prompt, before anything is filled in: what a remembered answer is an answer to."""
    return "\n".join(f"# {heading}\n{body.template}" for heading, body in prompt.items())
