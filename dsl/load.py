"""Files and what they may name: their own declarations, those they use, and the standard library."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from . import syntax as sx
from .diagnostics import Collector, Label, SpecError, fail, listed, near_or_all
from .parse import MOST_CHARACTERS, parse
from .source import Source, Span

_DECLARED = re.compile(r"^(?:block|model|pipeline|recipe|precision|layout)[ ]+([A-Za-z_]\w*)", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """A declaration and the file that it stands in, whose names it may use."""

    declaration: sx.Declaration
    file: File


@dataclass(eq=False)
class File:
    """A parsed file in its scope. `used` maps a name to the file that a `use` line takes it from."""

    source: Source
    path: Path
    module: sx.Module
    declared: dict[str, sx.Declaration] = field(default_factory=dict)
    used: dict[str, File] = field(default_factory=dict)
    is_standard: bool = False

    @property
    def checkpoints(self) -> tuple[sx.Checkpoint, ...]:
        return tuple(d for d in self.module.declarations if isinstance(d, sx.Checkpoint))

    def lookup(self, name: str) -> Found | None:
        """What a name stands for here: declared, used, or of the standard library."""
        if name in self.declared:
            return Found(self.declared[name], self)
        if name in self.used:
            return self.used[name].lookup(name)
        file = standard_file(name)
        return Found(file.declared[name], file) if file is not None else None

    def names(self) -> set[str]:
        """Every name that `lookup` finds."""
        return set(self.declared) | set(self.used) | set(standard_index())

    def all_files(self) -> list[File]:
        """This file and all it uses, each once."""
        found: dict[int, File] = {}
        waiting = [self]
        while waiting:
            file = waiting.pop()
            if id(file) not in found:
                found[id(file)] = file
                waiting.extend(file.used.values())
        return list(found.values())


@cache
def shipped_folder() -> Path:
    """The folder of the specs that come with Heddle."""
    return (Path(__file__).resolve().parent.parent / "specs").resolve()


@cache
def standard_index() -> dict[str, Path]:
    """Which file of the standard library declares a name, found without parsing."""
    found = {}
    for path in sorted((shipped_folder() / "std").glob("*.spec")):
        found.update(dict.fromkeys(_DECLARED.findall(path.read_text(encoding="utf-8")), path))
    return found


def standard_file(name: str) -> File | None:
    """The standard file that declares a name; it is parsed when one of its names is first asked for."""
    path = standard_index().get(name)
    return None if path is None else _standard(path)


@cache
def _standard(path: Path) -> File:
    source = Source(f"std/{path.name}", path.read_text(encoding="utf-8"))
    module = parse(source)
    declared: dict[str, sx.Declaration] = {d.name: d for d in module.declarations if not isinstance(d, sx.Checkpoint)}
    return File(source, path, module, declared, is_standard=True)


def load(path: str | Path, root: Path | None = None) -> File:
    """A file with all that it uses. `root` bounds what `use` may reach: the current folder if the file lies below it,
    else the file's folder; shipped specs are always in reach.

    Raises `SpecError`: no-such-file, not-text, syntax errors, use-cycle, path-escape, duplicate-name, unknown-name.
    """
    path = Path(path)
    here = Span(Source(str(path), ""), 0, 0)
    text = _read(path, str(path), here)
    return _Loader(_root_for(path.resolve(), root)).file(path.resolve(), Source(str(path), text))


def read_source(path: str | Path) -> Source:
    """The text of one file, not parsed. Raises `SpecError`: no-such-file, not-text."""
    path = Path(path)
    return Source(str(path), _read(path, str(path), Span(Source(str(path), ""), 0, 0)))


def load_text(text: str, name: str = "<string>", folder: Path | None = None) -> File:
    """A file that is given as text; `use` looks from `folder`, the current one if not given."""
    base = (folder or Path.cwd()).resolve()
    return _Loader(base).file(base / "<string>", Source(name, text))


def _root_for(path: Path, root: Path | None) -> Path:
    if root is not None:
        return root.resolve()
    here = Path.cwd().resolve()
    return here if path.is_relative_to(here) else path.parent


def _read(path: Path, shown: str, span: Span) -> str:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            is_folder = stat.S_ISDIR(info.st_mode)
            raise fail(
                "no-such-file",
                f"`{shown}` is {'a folder' if is_folder else 'a device'}, not a spec file",
                span,
                help=_specs_in(path) if is_folder else None,
            )
        if info.st_size > MOST_CHARACTERS:
            raise fail("too-large", f"`{shown}` has {info.st_size} bytes, at most {MOST_CHARACTERS} are read", span)
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise fail("no-such-file", f"there is no file `{shown}`", span, help=_nearby(path)) from None
    except OSError as error:
        raise fail("no-such-file", f"`{shown}` cannot be read: {error.strerror}", span) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        source = Source(shown, data[: error.start].decode("utf-8", "replace"))
        at = len(source.text)
        raise fail(
            "not-text",
            f"byte {error.start} of `{shown}` is 0x{data[error.start]:02x}, which is not UTF-8",
            Span(source, at, at),
            help="specs are UTF-8 text; `iconv` converts a file",
        ) from None


def _nearby(path: Path) -> str | None:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix == ".spec")
    except OSError:
        return f"there is no folder `{path.parent.name}` either"
    return near_or_all(path.name, names, "a file", "the specs there are")


def _shipped_as(name: str) -> str | None:
    """Where a shipped file of this name is, for a `use` line without its folder."""
    shipped = shipped_folder()
    found = sorted(p.relative_to(shipped).as_posix() for p in shipped.glob("*/*.spec") if p.name == name)
    return f"shipped: {listed(found[:3])}{', ...' * (len(found) > 3)}" if found else None


def _specs_in(folder: Path) -> str | None:
    names = sorted(p.name for p in folder.glob("*.spec"))
    return f"specs in it: {listed(names[:3])}{', ...' * (len(names) > 3)}" if names else "it has no specs"


class _Loader:
    """Loads the files of one project; each is parsed once."""

    def __init__(self, root: Path):
        self.root = root
        self.files: dict[Path, File] = {}
        self.open: list[tuple[Path, Span]] = []

    def file(self, path: Path, source: Source) -> File:
        module = parse(source)
        collector = Collector()
        made = File(source, path, module)
        self.files[path] = made
        self._declare(made, collector)
        self.open.append((path, Span(source, 0, 0)))
        for use in module.uses:
            with collector.collecting():
                self._use(made, use)
        self.open.pop()
        collector.finish()
        return made

    def _declare(self, file: File, collector: Collector) -> None:
        for d in file.module.declarations:
            if isinstance(d, sx.Checkpoint):
                continue
            if d.name in file.declared:
                first = file.declared[d.name]
                collector.add(
                    fail(
                        "duplicate-name",
                        f"`{d.name}` is declared twice",
                        d.name_span,
                        "the second",
                        [Label(first.name_span, "the first")],
                        "rename one of them, or remove it",
                    )
                )
            elif d.name in standard_index() and standard_index()[d.name] != file.path:
                where = f"std/{standard_index()[d.name].name}"
                collector.add(
                    fail(
                        "duplicate-name",
                        f"`{d.name}` is a name of the standard library ({where})",
                        d.name_span,
                        help="choose another name: files that use both would misread one of them",
                    )
                )
            file.declared.setdefault(d.name, d)

    def _use(self, file: File, use: sx.Use) -> None:
        path = self._resolve(file, use)
        cycle = next((i for i, (p, _) in enumerate(self.open) if p == path), None)
        if cycle is not None:
            chain = " -> ".join(p.name for p, _ in [*self.open[cycle:], self.open[cycle]])
            raise fail(
                "use-cycle",
                f"these files use each other: {chain}",
                use.path_span,
                "closes the circle",
                help="what both need can stand in a third file",
            )
        if path not in self.files:
            shown = self._shown(file, path)
            self.files[path] = self.file(path, Source(shown, _read(path, use.path, use.path_span)))
        collector = Collector()
        for name in use.names:
            with collector.collecting():
                file.used[name.id] = self._used(file, use, name, self.files[path])
        collector.finish()

    def _used(self, file: File, use: sx.Use, name: sx.Name, other: File) -> File:
        if name.id in other.used:
            source = other.used[name.id].path.name
            raise fail(
                "unknown-name",
                f"`{use.path}` declares nothing named `{name.id}`",
                name.span,
                "not declared there",
                help=f"`{use.path}` takes it from `{source}`: use it from there",
            )
        if name.id not in other.declared:
            raise fail(
                "unknown-name",
                f"`{use.path}` declares nothing named `{name.id}`",
                name.span,
                "not declared there",
                help=near_or_all(name.id, other.declared, "a declaration", f"`{use.path}` declares"),
            )
        if name.id in file.declared:
            raise fail(
                "duplicate-name",
                f"`{name.id}` is declared in this file too",
                name.span,
                "used here",
                [Label(file.declared[name.id].name_span, "declared here")],
                "rename the one of this file",
            )
        if name.id in file.used:
            first = next(n for u in file.module.uses for n in u.names if n.id == name.id)
            raise fail(
                "duplicate-name",
                f"`{name.id}` is used twice",
                name.span,
                "the second",
                [Label(first.span, "the first")],
                "one `use` of it is enough",
            )
        return other

    def _resolve(self, file: File, use: sx.Use) -> Path:
        """The file that a `use` line means: beside the file, else among the shipped specs."""
        given = Path(use.path)
        if given.is_absolute() or re.match(r"[A-Za-z]:|\\", use.path):
            raise fail(
                "path-escape",
                f"`{use.path}` is an absolute path",
                use.path_span,
                help="paths are relative to the file that uses them",
            )
        shipped = shipped_folder()
        try:
            near = (file.path.parent / given).resolve()
            far = (shipped / given).resolve()
            allowed = near.is_relative_to(self.root) or near.is_relative_to(shipped)
            if allowed and near.is_file():
                return near
            if far.is_relative_to(shipped) and far.is_file():
                return far
        except (OSError, RuntimeError) as error:  # a name that is too long, links that lead to each other
            why = getattr(error, "strerror", None) or "links in a circle"
            raise fail("no-such-file", f"`{use.path}` cannot be found: {why}", use.path_span) from None
        if not allowed:
            raise fail(
                "path-escape",
                f"`{use.path}` leaves the project",
                use.path_span,
                "outside the project's folder",
                help=f"the project is the folder `{self.root.name}`",
            )
        raise fail(
            "no-such-file",
            f"there is no file `{use.path}`",
            use.path_span,
            "neither beside this file nor shipped under this path",
            help=_shipped_as(given.name) or _nearby(near),
        )

    def _shown(self, file: File, path: Path) -> str:
        """How messages name a file: like the file that uses it, relative to the same place."""
        shipped = shipped_folder()
        if path.is_relative_to(shipped) and not path.is_relative_to(self.root):
            return path.relative_to(shipped).as_posix()
        base = Path(file.source.name).parent
        try:
            return (base / path.relative_to(file.path.parent)).as_posix()
        except ValueError:
            return path.name


__all__ = ["File", "Found", "SpecError", "load", "load_text", "shipped_folder"]
