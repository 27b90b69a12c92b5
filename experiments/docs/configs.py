"""Generator of docs/configs.md: all config keys, read from the code that defines them.

python -m experiments.docs.configs > docs/configs.md
"""

import ast
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path

from configs import base, official, presets
from dinotwins_jax.augment.presets import PRESETS as VIEWS
from dinotwins_jax.augment.views import make_view_specs
from dinotwins_jax.losses import LOSSES
from dinotwins_jax.settings.keys import flatten
from dinotwins_jax.settings.ranges import CHOICES, RANGES
from dinotwins_jax.workdir import _FREE as FREE

HEAD = """# Every key of a config

Written by `python -m experiments.docs.configs > docs/configs.md`: do not edit. It reads
[configs/base.py](../configs/base.py), [ranges.py](../dinotwins_jax/settings/ranges.py) and the factories in
[losses/](../dinotwins_jax/losses/). Any key can be set on the command line, `--config.optim.lr=0.001`; an
unknown key or a value out of range gives one line on stderr and exit code 2. Without an entry under
values, only the type is checked, or keys are checked together in [build.py](../dinotwins_jax/build.py).
"""
COMMON = {
    "fn": "a key of losses/, or `module:factory`; default: the term's name",
    "weight": "factor of this term in the sum",
    "final_weight": "end of a cosine schedule of the weight",
    "weight_warmup_epochs": "linear warm-up of the weight from 0",
}


def comments_of(source: str) -> dict[int, tuple[str, bool]]:
    """Line number -> (its comment, whether the line has nothing else)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.removeprefix("#").strip(), alone)
    return found


def meaning(node: ast.AST, comments: dict) -> str:
    """Comments directly above a statement and inside it."""
    first = node.lineno
    while comments.get(first - 1, ("", False))[1]:
        first -= 1
    last = node.end_lineno
    return " ".join(comments[line][0] for line in range(first, last + 1) if line in comments)


def default_text(node: ast.AST, source: str) -> str:
    """A value as written; "unset" for a placeholder."""
    text = re.sub(r"\s+", " ", ast.get_source_segment(source, node))
    return "unset" if "placeholder" in text else text


def base_keys() -> dict[str, tuple[str, str]]:
    """Key -> (default as written, meaning) of configs/base.py; a section's key ends with a dot."""
    source = inspect.getsource(base)
    comments = comments_of(source)
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_config"
    )
    keys = {}
    for node in body:
        target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if not target.startswith("c."):
            continue
        key, value = target.removeprefix("c."), node.value
        if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "ConfigDict"):
            keys[key] = (default_text(value, source), meaning(node, comments))
            continue
        keys[f"{key}."] = ("", meaning(node, comments))
        for entry in value.args:
            for name, of in zip(entry.keys, entry.values, strict=True):
                keys[f"{key}.{name.value}"] = (default_text(of, source), "")
    return keys | {
        key: (keys[own][0], f"as `{own}`")
        for key in flatten(base.get_config().to_dict())
        if key not in keys and (own := key.replace("data.probe.", "data.")) in keys
    }


def term_comments() -> dict[str, dict[str, str]]:
    """Term -> {argument: comment beside it in configs/base.py}."""
    source = inspect.getsource(base)
    comments, found = comments_of(source), {}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_terms"):
            own = found.setdefault(function.name.removesuffix("_terms"), {})
            for node in ast.walk(function):
                if isinstance(node, ast.Dict):
                    for key, value in zip(node.keys, node.values, strict=True):
                        comment = comments.get(value.end_lineno, ("", False))[0]
                        if key is not None and comment:
                            own[key.value] = comment
    return found


def documented_arguments(docstring: str) -> dict[str, str]:
    """Argument -> its text in the Args of a docstring; arguments may share a sentence."""
    part = re.search(r"\n\s*Args:(.*?)(\n\s*(Returns|Raises|Source|Differs):|$)", docstring, re.S)
    found, current = {}, ()
    for line in part[1].splitlines() if part else ():
        entry = re.match(r"\s*((?:\w+, )*\w+): (.*)", line)
        if entry:
            current = entry[1].split(", ")
            found |= dict.fromkeys(current, entry[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return {name: re.split(r"[.;] (?=\w+: )", text)[0] for name, text in found.items()}


def values_text(key: str) -> str:
    """Valid values of a key."""
    if key in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[key])
    interval = RANGES.get(key, "")
    return {"(0, inf)": "> 0", "[0, inf)": "≥ 0"}.get(interval, interval)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines
    )


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def sections() -> str:
    """A table of each section of configs/base.py."""
    keys, parts = base_keys(), {}
    views = documented_arguments(inspect.getdoc(make_view_specs))
    for key in keys:
        parts.setdefault(key.partition(".")[0] if "." in key else "", []).append(key)
    text = []
    for section, names in parts.items():
        if section == "loss":
            continue
        rows, intro, waiting = [], keys.get(f"{section}.", ("", ""))[1], ""
        for name in names:
            default, said = keys[name]
            if name.endswith("."):
                waiting = said if name != f"{section}." else ""
                continue
            said = said or waiting or (section == "views" and views.get(name[6:])) or ""
            rows.append([code(name), code(default), values_text(name), said])
            waiting = ""
        title = f"`{section}`" if section else "The run"
        header = ["key", "default", "values", "meaning"]
        text.append("\n\n".join(filter(None, [f"## {title}", intro, table(header, rows)])))
    return "\n\n".join(text)


def losses() -> str:
    """The terms of the loss and their factories' arguments."""
    intro = base_keys()["loss."][1]
    rows = [[code(f"loss.<term>.{name}"), said] for name, said in COMMON.items()]
    text = [f"## `loss`\n\n{intro}\n\n{table(['key of every term', 'meaning'], rows)}"]
    said = term_comments()
    for name, path in LOSSES.items():
        module, _, attribute = path.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        terms = getattr(base, f"{name}_terms", None)
        shipped = {} if terms is None else terms().to_dict()
        documented = documented_arguments(inspect.getdoc(factory))
        rows = []
        for argument, value in _keys_of_term(factory, shipped).items():
            key = f"loss.{name}.{argument}"
            about = said.get(name, {}).get(argument) or documented.get(argument, "")
            rows.append([code(key), code(repr(value)), values_text(key), about])
        weight = f"; `base.{name}_terms` has weight {shipped['weight']:g}" if shipped else ""
        first = inspect.getdoc(factory).splitlines()[0]
        link = f"[{module.rpartition('.')[2]}.py](../{module.replace('.', '/')}.py)"
        title = f"### `loss.{name}`\n\n{first} {link}{weight}.".replace(".;", ";")
        header = ["key", "default", "values", "meaning"]
        text.append(f"{title}\n\n{table(header, rows)}" if rows else title)
    return "\n\n".join(text)


def _keys_of_term(factory, shipped: dict) -> dict:
    """Argument -> default: those of base.py, then the factory's others; "…_epochs" of a config
    are "…_steps" of a factory."""
    keys = {name: value for name, value in shipped.items() if name not in COMMON}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name not in keys and name.replace("_steps", "_epochs") not in keys:
            keys[name] = parameter.default
    return keys


def methods() -> str:
    """Table of what each file in configs/ changes."""
    folder, rows = Path(base.__file__).parent, []
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if not hasattr(module, "get_config") or module is base:
            continue
        config = module.get_config("coco").to_dict()
        losses = config.pop("loss")
        terms = ", ".join(f"`{name}` × {of.pop('weight'):g}" for name, of in losses.items())
        usual = {name: getattr(base, f"{name}_terms")().to_dict() for name in losses}
        plain = flatten(base.get_config().to_dict() | {"loss": usual})
        given = flatten({"loss": losses} | config)
        changed = [f"`{k}={v!r}`" for k, v in given.items() if plain.get(k, v) != v]
        link = f"[{path.name}](../configs/{path.name})"
        rows.append([link, terms, ", ".join(changed)])
    header = ["config", "terms and weights", "other differences to base.py"]
    return f"## Methods\n\n{table(header, rows)}"


def places() -> str:
    """Table of what the presets after the colon change in configs/hybrid.py."""
    from configs import hybrid

    flat = {name: flatten(hybrid.get_config(name).to_dict()) for name in presets.PRESETS}
    plain = flat["coco"]
    keys = [key for key in plain if any(of[key] != plain[key] for of in flat.values())]
    order = ["coco", *(name for name in presets.PRESETS if name != "coco")]
    rows = []
    for key in keys:
        cells = [flat[name][key] for name in order]
        cells = [c if k == 0 or c != cells[0] else "" for k, c in enumerate(cells)]
        rows.append([code(key), *("" if c == "" else code(_short(c)) for c in cells)])
    words = "What the word after the colon changes in `configs/hybrid.py`; an empty cell is as in `coco`."
    return f"## Presets\n\n{words}\n\n{table(['key', *map(code, order)], rows)}"


def _short(value) -> str:
    if value is None:
        return "unset"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def augmentations() -> str:
    """Table of what the words after a plus sign change."""
    keys = [k for k in VIEWS["dino"] if len({repr(of[k]) for of in VIEWS.values()}) > 1]
    rows = [[code(f"views.{k}"), *(code(repr(of[k])) for of in VIEWS.values())] for k in keys]
    words = (
        "What a word after a plus sign changes, such as `configs/hybrid.py:coco+dinov2_as_trained`; all "
        "other keys of `views` but the sizes are DINO's."
    )
    return f"## Crops of papers\n\n{words}\n\n{table(['key', *map(code, VIEWS)], rows)}"


def recipes() -> str:
    """Table of the keys in which the official recipes differ, a column each."""
    methods = dict(zip(official.RECIPES, ("dino", "barlow_twins", "dinov2", "dinov3"), strict=True))
    columns = {
        f"{methods[kinds]}:…+{word}": recipe
        for kinds, words in official.RECIPES.items()
        for word, recipe in words.items()
    }
    keys = list(dict.fromkeys(key for recipe in columns.values() for key in recipe))
    rows = []
    for key in sorted(keys):
        if len({repr(of[key]) for of in columns.values() if key in of}) > 1 or "gram" in key:
            cells = (code(_short(of[key])) if key in of else "" for of in columns.values())
            rows.append([code(key), *cells])
    words = (
        "The keys in which the recipes of [official.py](../configs/official.py) differ; where a cell is "
        "empty, the recipe leaves the key. `loss.gram` unset: no such term. What each is, and what stays "
        "different: [method.md](method.md#official-recipes)."
    )
    return f"## Official recipes\n\n{words}\n\n{table(['key', *map(code, columns)], rows)}"


def free() -> str:
    keys = ", ".join(f"`{key}{'…' if key.endswith('.') else ''}`" for key in FREE)
    words = (
        "of the same workdir is refused where a key differs. These may, as they change no weight"
    )
    return f"## A second start\n\n{words} beyond rounding: {keys}."


def document() -> str:
    """The whole page."""
    parts = [
        HEAD.strip(),
        sections(),
        losses(),
        methods(),
        places(),
        augmentations(),
        recipes(),
        free(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(document(), end="")
