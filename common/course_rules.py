"""The rules that every source file of the course keeps; test_course.py applies them.

A rule takes the root folder of a course and yields complaints, one line each: `file:line what (value) rule`.
Projects are the folders phase*/project*, so a new one is held to every rule without a change here.
The rules about what the course tells its readers to click and type are in course_docs.py.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

SECTIONS = ["PAPER", "PAPER CONTEXT", "INTUITION", "IMPLEMENTATION", "WHY"]
EXPLAINED_ONCE = {"main", "interact", "validate_config"}  # mean the same everywhere; common/ says what
FACTORIES = {
    "TypeVar",
    "ParamSpec",
    "NewType",
    "namedtuple",
    "partial",
    "getLogger",
}  # calls that name a thing
DEEDS = {"from_cli", "parse_args", "open", "read_text", "read_bytes", "download", "load_corpus", "run"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@cache
def parse(text: str) -> ast.Module:
    """Return the syntax tree of a source text, which every rule asks for again."""
    return ast.parse(text)


class Module:
    """One Python file of the course: its text, its syntax tree, and what kind of file it is."""

    def __init__(self, root: Path, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(root).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.tree = parse(self.text)
        number = re.match(r"phase\d+\w*/project(\d+)", self.name)
        self.project = int(number[1]) if number else None  # None in common/
        self.main = next((ast.unparse(node) for node in self.tree.body if is_guard(node)), "")
        self.is_test = path.name.startswith("test_") or path.name == "conftest.py"
        self.is_script = bool(self.main) and not self.is_test
        # An idea file holds what a project teaches: it is neither settings, nor script, nor test.
        plumbing = self.is_test or self.is_script or path.name in ("__init__.py", "config.py")
        self.is_idea = self.project is not None and not plumbing

    def says(self, what: str, node: ast.AST | None = None) -> str:
        """Return a complaint about a place in this file, or about the whole of it."""
        return f"{self.name}:{getattr(node, 'lineno', 1)} {what}"


def is_guard(node: ast.stmt) -> bool:
    """Say whether a statement is `if __name__ == "__main__":`, which makes a file a script."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def packages(root: Path) -> set[str]:
    """Return the names of the course's own top-level packages."""
    return {"common", *(path.name for path in root.glob("phase*"))}


def projects(root: Path) -> list[Path]:
    """Return the folders of the projects in the order of their numbers."""
    folders = [path for path in root.glob("phase*/project*") if path.is_dir()]
    return sorted(folders, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def modules(root: Path) -> list[Module]:
    """Return every Python file of common/, the phases and the projects."""
    folders = [root / "common", *sorted(root.glob("phase*"))]
    return [Module(root, path) for folder in folders for path in sorted(folder.rglob("*.py"))]


def standard_files(root: Path) -> Iterator[str]:
    """A project has README.md, config.py, an idea file and a test; every folder of code has __init__.py."""
    code = modules(root)
    for folder in projects(root):
        mine = [module for module in code if folder in module.path.parents]
        present = {
            "README.md": (folder / "README.md").is_file(),
            "config.py": (folder / "config.py").is_file(),
            "an idea file": any(module.is_idea for module in mine),
            "a test_*.py": any(module.path.name.startswith("test_") for module in mine),
        }
        for file in [file for file, there in present.items() if not there]:
            yield f"{folder.relative_to(root).as_posix()}:1 project ({folder.name}) must have {file}"
    phases = [path for path in root.glob("phase*") if path.is_dir()]
    for folder in sorted(
        {root / "common", *phases, *projects(root), *(module.path.parent for module in code)}
    ):
        if not (folder / "__init__.py").is_file():
            yield f"{folder.relative_to(root).as_posix()}:1 folder ({folder.name}) must have __init__.py"


def imported(node: ast.AST) -> list[str]:
    """Return the full names that an import statement asks for, and nothing for any other node."""
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def imports_point_down(root: Path) -> Iterator[str]:
    """Imports are absolute: a project imports common and projects up to its own number, common no project."""
    for module in modules(root):
        neighbours = {path.stem for path in module.path.parent.glob("*.py")} - used_names() - packages(root)
        highest = module.project or 0
        for node in ast.walk(module.tree):
            for name in imported(node):
                number = re.match(r"phase\d+\w*\.project(\d+)", name)
                if name.startswith(".") or name.split(".")[0] in neighbours:
                    yield module.says(f"import ({name}) must be absolute, from the root of the course", node)
                elif number and int(number[1]) > highest:
                    yield module.says(f"import ({name}) must not point above project {highest}", node)
            if edits_search_path(node):
                yield module.says(f"sys.path ({ast.unparse(node)}) must stay as it is", node)


def edits_search_path(node: ast.AST) -> bool:
    """Say whether a statement or a call changes sys.path."""
    match node:
        case ast.Call(ast.Attribute(owner, method)):
            return ast.unparse(owner) == "sys.path" or method == "addsitedir"
        case ast.Assign(targets) | ast.Delete(targets):
            return any(ast.unparse(target).startswith("sys.path") for target in targets)
        case ast.AugAssign(target):
            return ast.unparse(target).startswith("sys.path")
    return False


@cache
def used_names() -> frozenset[str]:
    """Return the module names of the standard library and of the installed packages."""
    return frozenset(sys.stdlib_module_names | packages_distributions().keys())


def names_hide_nothing(root: Path) -> Iterator[str]:
    """No file takes the name of another module: the folder of a script comes first on the search path."""
    for module in modules(root):
        inside = [] if module.path.parent.parent == root else [module.path.parent.name]
        for name in [module.path.stem, *inside]:
            if name != "__init__" and name in used_names() | packages(root):
                yield module.says(f"module name ({name}) must not hide another module")


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    """Yield the public classes and functions among some statements, and the public methods of the classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            yield from public(node.body) if isinstance(node, ast.ClassDef) else ()


def inherited(classes: dict[str, ast.ClassDef], name: str) -> set[str]:
    """Return the names of the methods that the bases of a class describe, as far as they are in `classes`."""
    told, seen, left = set(), {name}, [classes[name]]
    while left:
        names = {ast.unparse(base).split("[")[0].split(".")[-1] for base in left.pop().bases}
        bases = [classes[base] for base in names & classes.keys() - seen]
        seen |= names
        left += bases
        told |= {node.name for base in bases for node in public(base.body) if ast.get_docstring(node)}
    return told


def docstrings_exist(root: Path) -> Iterator[str]:
    """Each module, public class, function and method says in a line, at least, what it is or does.

    A method may leave that to the method of the course that it overrides.
    """
    code = [module for module in modules(root) if not module.is_test and module.path.name != "__init__.py"]
    tops = [node for module in code for node in module.tree.body if isinstance(node, ast.ClassDef)]
    classes = {node.name: node for node in tops}
    overrides = {
        method
        for node in tops
        for method in public(node.body)
        if method.name in inherited(classes, node.name)
    }
    for module in code:
        if not ast.get_docstring(module.tree):
            yield module.says(f"module ({module.path.stem}) must have a docstring")
        for node in public(module.tree.body):
            if not ast.get_docstring(node) and node.name not in EXPLAINED_ONCE and node not in overrides:
                yield module.says(f"{node.name} (no docstring) must say what it is or does", node)


def works(node: ast.ClassDef) -> bool:
    """Say whether a class does something: a record, a protocol, an enumeration or an error does not."""
    methods = [item for item in node.body if isinstance(item, Function)]
    last = [item.body[-1] for item in methods if item.name not in ("__post_init__", "validate_config")]
    return any(not (isinstance(end, ast.Expr) and isinstance(end.value, ast.Constant)) for end in last)


def missing_sections(node: Definition) -> str:
    """Name what a docstring lacks of a first sentence and the five sections, filled and in order."""
    docstring = ast.get_docstring(node) or ""
    summary, *parts = re.split(rf"^ *({'|'.join(SECTIONS)}):", docstring, flags=re.MULTILINE)
    filled = [name for name, text in zip(parts[::2], parts[1::2], strict=True) if text.strip()]
    missing = [name for name in SECTIONS if name not in filled]
    if not summary.strip():
        return "first sentence"
    return ", ".join(missing) or ("order" if filled != SECTIONS else "")


def ideas_are_explained(root: Path) -> Iterator[str]:
    """In an idea file each public class that works has the five sections, or else some public function.

    An idea file is any of a project but config.py, tests and scripts (`if __name__ == "__main__"`). A class
    works if a method of it has a body; records, protocols, enumerations and errors need only their line.
    """
    rule = "must have a first sentence and the five sections in order"
    for module in modules(root):
        tops = [node for node in public(module.tree.body) if node in module.tree.body]
        classes = [node for node in tops if isinstance(node, ast.ClassDef) and works(node)]
        for node in classes if module.is_idea else []:
            if missing := missing_sections(node):
                yield module.says(f"{node.name} (no {missing}) {rule}", node)
        if module.is_idea and not classes and all(missing_sections(node) for node in tops):
            yield module.says(f"idea file ({module.path.stem}, no key function) {rule}")


def docstrings(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Yield every docstring of a file and the node that it is written in."""
    for node in ast.walk(tree):
        if isinstance(node, Definition | ast.Module) and (text := ast.get_docstring(node)) is not None:
            yield text, node.body[0]


def cited(docstring: str) -> set[str]:
    """Return the n of each [n] that cites a paper; x[1], [128, 64] and what stands in an example do not."""
    prose = re.sub(r"^ *>>>.*?(\n\s*\n|\Z)", "", docstring, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"(?<![\w)])\[([1-9]\d?)\]", prose))


def listed(docstring: str) -> dict[str, str]:
    """Return the entries of the list of PAPERS in a module's docstring by their numbers."""
    block = re.search(r"^PAPERS.*\n((?:[ ]+.*(?:\n|\Z)|\n)*)", docstring, flags=re.MULTILINE)
    entries = re.split(r"^ +\[(\d+)\]", block[1] if block else "", flags=re.MULTILINE)
    return dict(zip(entries[1::2], entries[2::2], strict=True))


def papers_are_listed(root: Path) -> Iterator[str]:
    """An idea file lists its PAPERS, each with arXiv number or year; a docstring's [n] are among them."""
    number = r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7})(v\d+)?(?!\w)"
    for module in modules(root):
        papers = listed(ast.get_docstring(module.tree) or "")
        if module.is_idea and not papers:
            yield module.says(f"PAPERS ({module.path.stem} lists none) must name a paper")
        for n, entry in papers.items():
            if not re.search(number if "arXiv" in entry else r"\b(18|19|20)\d\d\b", entry):
                yield module.says(
                    f"PAPERS ([{n}] {' '.join(entry.split())}) must give arXiv:NUMBER or a year"
                )
        for text, node in [] if module.is_test else docstrings(module.tree):
            for n in sorted(cited(text) - papers.keys()):
                yield module.says(f"citation ([{n}]) must be in the PAPERS of its module", node)


def text_is_clean(root: Path) -> Iterator[str]:
    r"""No control character stands in a source; a docstring with a backslash is raw (\b is one)."""
    for module in modules(root):
        lines = module.path.read_bytes().decode().split("\n")
        for number, line in enumerate(lines, start=1):
            for char in sorted(set(re.findall(r"[\x00-\x1f\x7f-\x9f]", line))):
                yield f"{module.name}:{number} character ({char!r}) must be written as an escape"
        for _, node in docstrings(module.tree):
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno]).lstrip()
            if "\\" in source and not source.lower().startswith("r"):
                yield module.says('docstring (with a backslash) must be raw: r"""', node)


def deeds(statement: ast.stmt, is_test: bool) -> Iterator[ast.stmt]:
    """Yield what a module-level statement does on import, other than import, define or name a constant."""
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return
        case ast.Expr(ast.Constant()):  # a docstring
            return
        case ast.If() | ast.Try():
            handled = [item for handler in getattr(statement, "handlers", []) for item in handler.body]
            inner = [*statement.body, *handled, *statement.orelse, *getattr(statement, "finalbody", [])]
            for item in [] if is_guard(statement) else inner:
                yield from deeds(item, is_test)
        case ast.Assign() | ast.AnnAssign():
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            called = [ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)]
            names = {name.split(".")[-1] for name in called}
            constant = is_test or ast.unparse(target).isupper()
            if names & DEEDS or (names - FACTORIES and not constant):
                yield statement
        case ast.Expr(ast.Call(func)) if is_test and ast.unparse(func) == "pytest.importorskip":
            return
        case _:
            yield statement


def nothing_runs_on_import(root: Path) -> Iterator[str]:
    """A module only imports, defines, and names constants (in capitals, if a call makes them)."""
    for module in modules(root):
        for statement in module.tree.body:
            for node in deeds(statement, module.is_test):
                yield module.says(
                    f"statement ({ast.unparse(node).splitlines()[0]}) must not run on import", node
                )


def unsafe(node: ast.AST, is_test: bool) -> str:
    """Return what is wrong with a node as `what (value) rule`, or nothing."""
    match node:
        case ast.ExceptHandler(type=None):
            return "except (everything) must name what it catches"
        case ast.Assert() if not is_test:
            return f"assert ({ast.unparse(node.test)}) must be a ValueError outside tests"
        case ast.Import() | ast.ImportFrom() if not is_test:
            names = [name for name in imported(node) if name.split(".")[0] in PICKLES]
            harmful = [name for name in names if name != "pickle.UnpicklingError"]  # what a refusal raises
            return f"import ({harmful[0]}) must not bring in pickles" if harmful else ""
        case ast.Call():
            given = {item.arg: ast.unparse(item.value) for item in node.keywords}
            called = ast.unparse(node.func)
            if called in ("exec", "eval"):
                return f"call ({called}) must not run text as code"
            if called == "torch.load" and given.get("weights_only") != "True":
                return f"torch.load ({ast.unparse(node)}) must say weights_only=True"
            if given.get("allow_pickle") == "True":
                return f"allow_pickle ({ast.unparse(node)}) must not be True"
    return ""


def nothing_is_unsafe(root: Path) -> Iterator[str]:
    """No pickle is read, no text runs as code, no except is bare, and no assert stands outside tests."""
    for module in modules(root):
        for node in ast.walk(module.tree):
            if what := unsafe(node, module.is_test):
                yield module.says(what, node)


def tests_are_scripts(root: Path) -> Iterator[str]:
    """Each test file of a project ends in `if __name__ == "__main__": run_validation(__file__, ...)`."""
    for module in modules(root):
        if (
            module.project
            and module.path.name.startswith("test_")
            and "run_validation(__file__" not in module.main
        ):
            yield module.says(
                f"test file ({module.path.name}) must call run_validation(__file__, ...) as a script"
            )
