"""What a browser would run, load and follow of a page, for tests that no page does more than it should."""

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Page(HTMLParser):
    """What a browser would run, load and follow of a page."""

    problems: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        given = {name: value or "" for name, value in attrs}
        if tag in ("style", "iframe", "object", "embed", "base", "template"):
            self.problems.append(f"<{tag}>")
        if tag == "script" and not given.get("src", "").startswith("/static/"):
            self.problems.append(f"script from {given.get('src')!r}")
        for name, value in given.items():
            if name.startswith(("on", "hx-on")) or name in ("style", "srcdoc", "hx-vars"):
                self.problems.append(f"<{tag} {name}={value[:80]!r}>")
            is_address = name in ("href", "src", "action", "formaction", "hx-get", "hx-post", "xlink:href", "poster")
            is_own = (value.startswith(("/", "#")) and not value.startswith(("//", "/\\"))) or value.startswith("data:image/webp;")
            if is_address and not is_own:
                self.problems.append(f"<{tag} {name}={value[:80]!r}>")
        if tag == "a":
            self.links.append(given.get("href", ""))
        self.links += [given[name] for name in ("src", "hx-get") if name in given]

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.inside == "script" and data.strip():
            self.problems.append(f"inline script {data[:80]!r}")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def read(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    return page
