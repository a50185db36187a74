"""One self-contained HTML page that compares runs."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from lcm.report import tables
from lcm.report.analyses import analyses
from lcm.report.runs import ReportError, read_all
from lcm.report.sections import (
    Picture,
    Published,
    Section,
    configuration,
    evaluation,
    provenance,
    published_beside_measured,
    training,
)
from lcm.report.style import CSS


def write(
    workdirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    title: str = "Length report",
    sections: Sequence[Section] = (),
    published: Sequence[Published] = (),
    command: str | None = None,
) -> Path:
    """Compare the runs in one page at `out`, its pictures inside it and as PNG files beside it.

    A folder as `out` stands for report.html in it. `sections` come first, before what is read from
    the workdirs. Returns the path of the page.
    Raises ReportError for workdirs with nothing to report and where the page cannot be written.
    """
    runs = read_all(workdirs)
    out = Path(out)
    out = out / "report.html" if out.is_dir() else out
    shown = [
        *sections,
        *([published_beside_measured(published)] if published else []),
        *evaluation(runs),
        *analyses(runs),
        *training(runs),
        configuration(runs),
        provenance(runs, command),
    ]
    return publish(shown, out, title=title)


def publish(sections: Sequence[Section], out: str | os.PathLike[str], *, title: str) -> Path:
    """Write sections as one page at `out`, its pictures inside it and as PNG files beside it.

    Raises ReportError where the page cannot be written.
    """
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for picture in (picture for section in sections for picture in section.pictures):
            _replace(out.parent / f"{out.stem}-{picture.name}.png", picture.png)
        _replace(out, render(title, sections).encode())
    except OSError as error:
        raise ReportError(f"cannot write the report to {out}: {error.strerror}") from error
    return out


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML: no script, nothing fetched."""
    body = "\n".join(_section(section) for section in sections)
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    text = "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text)
    body = "\n".join([text, *map(tables.to_html, section.tables), *map(_picture, section.pictures)])
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n{body}\n</section>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
