"""Who may import whom (README, "Where each thing is"): read off the syntax trees, so that nothing has to be imported.

The Hub's code copier follows single-dot sibling imports only and reports every import outside `try` as a requirement of
the model; the rules about form come from there.
"""

import ast
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
CORE_PACKAGES = {"torch", "transformers", "huggingface_hub", "safetensors", "PIL", "tokenizers", "numpy", "ftfy"}
# Installed with the core packages, so present wherever they are.
CORE_BRINGS = {"filelock", "tqdm", "yaml", "fsspec", "packaging", "regex"}

OURS = {"pyramidclip_command", "pyramidclip_hf", "conversion", "training"}

# Each module of the package and the siblings it may import. A new module gets its place here first.
LEVELS = {
    "levels_pyramidclip",
    "architectures_pyramidclip",
    "configuration_pyramidclip",
    "saved_folders_pyramidclip",
    "versions_pyramidclip",
}
TOWERS = LEVELS | {"loss_pyramidclip", "half_weights_pyramidclip"}
PARTS = {"modeling_pyramidclip_text", "modeling_pyramidclip_resnet"}
BLOCKS = TOWERS | PARTS | {"modeling_pyramidclip_vit"}
MODEL = BLOCKS | {"fusion_pyramidclip", "modeling_pyramidclip_base"}
PREPROCESSING = {
    "levels_pyramidclip",
    "configuration_pyramidclip",
    "saved_folders_pyramidclip",
    "image_processing_pyramidclip",
    "tokenization_pyramidclip",
}
SIBLINGS = {
    "versions_pyramidclip": set(),
    "levels_pyramidclip": set(),
    "architectures_pyramidclip": set(),
    "saved_folders_pyramidclip": set(),
    "configuration_pyramidclip": LEVELS - {"configuration_pyramidclip"},
    "loss_pyramidclip": LEVELS,
    "half_weights_pyramidclip": set(),
    "modeling_pyramidclip_text": TOWERS,
    "modeling_pyramidclip_resnet": TOWERS | {"modeling_pyramidclip_text"},
    "modeling_pyramidclip_vit": TOWERS | PARTS,
    "fusion_pyramidclip": BLOCKS,
    "modeling_pyramidclip_base": BLOCKS | {"fusion_pyramidclip"},
    "modeling_pyramidclip": MODEL,
    "modeling_pyramidclip_backbone": BLOCKS | {"modeling_pyramidclip_base"},
    "configuration_detection": TOWERS,
    "modeling_detection": BLOCKS
    | {"modeling_pyramidclip_base", "configuration_detection", "image_processing_pyramidclip"},
    "explain": MODEL | {"modeling_pyramidclip", "image_processing_pyramidclip"},
    "image_processing_pyramidclip": {"configuration_pyramidclip", "saved_folders_pyramidclip"},
    "tokenization_pyramidclip": {"configuration_pyramidclip", "saved_folders_pyramidclip"},
    "processing_pyramidclip": PREPROCESSING | {"versions_pyramidclip"},
    "zero_shot": PREPROCESSING | {"processing_pyramidclip"},
    "files": set(),
    "hub_reach": set(),
    "handing_out": set(),
    "ray_engine": {"handing_out"},
    "pages": set(),
    "parquet_pages": set(),
    "hits_page": {"pages", "image_processing_pyramidclip", "picture_files"},
    "embedding_files": {"files", "parquet_pages"},
    "embedding_index": PREPROCESSING | {"processing_pyramidclip", "zero_shot", "embedding_files", "files"},
    "picture_files": {"image_processing_pyramidclip", "files"},
}
# These put the parts together and may import any sibling.
ASSEMBLERS = {
    "__init__",
    "auto_classes",
    "hub",
    "loading",
    "backends",
    "export",
    "embedding_search",
    "app",
    "app_page",
    "commands",
}
# Installed with the package, for these modules: what else is copied to the Hub with a model must not need them.
HELPERS = {
    "filelock": {"files"},
    "pyramidclip_command": {"__init__", "commands", "export", "loading", "app_page", "handing_out", "ray_engine"},
}

# The layers of `training/` from the top: an import leads to a lower line or stays in its room. What lies directly in
# `training/` is a command, and so is what lies directly in `training/prepare/`, whose rooms hold what it is made of.
LAYERS = (
    {"commands"},
    {"emoji"},
    {"transfer"},
    {"loop"},
    {"prepare"},
    {"reports", "settings"},
    {"evaluation"},
    {"data"},
    {"pyramidclip_hf"},
)
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
# The commands that run another one: that is what they are for.
RUNS_ANOTHER = {
    ("training.prepare.openclipart", "training.prepare.pack"),
    ("training.demo", "training.pretrain"),
    ("training.ablations", "training.pretrain"),
    ("training.detection_table", "training.detection"),
    ("training.pretrain", "training.scale"),  # where a GPU's memory is too small
}


def source_files(*folders):
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


def parents_of(tree):
    """node -> the nodes around it, innermost first."""
    around = {tree: ()}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            around[child] = (node, *around[node])
    return around


def imports_of(tree):
    """(node, dots, dotted module name, imported name or None) for each name that an import statement brings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, 0, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, node.level, node.module or "", alias.name) for alias in node.names)


def inside_function(around):
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in around)


def for_types_only(around):
    """Whether a node stands in `if TYPE_CHECKING:`."""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for node in around)


def inside_import_try(node, around):
    """Whether `node` stands in the body of a `try` that catches ImportError."""
    for outer in around:
        if isinstance(outer, ast.Try) and any(node is inner for part in outer.body for inner in ast.walk(part)):
            caught = " ".join(ast.unparse(handler.type) for handler in outer.handlers if handler.type)
            if "ImportError" in caught or "ModuleNotFoundError" in caught:
                return True
    return False


def form_faults(tree):
    """Relative imports must read `from .sibling import name`; nothing is imported by star."""
    for node, dots, module, name in imports_of(tree):
        if name == "*":
            yield f"line {node.lineno}: star import"
        if dots > 1 or (dots == 1 and (not module or "." in module)):
            yield f"line {node.lineno}: write it as `from .sibling import name`: {ast.unparse(node)}"


def package_faults(tree):
    """Faults of a module of `pyramidclip_hf` (or of vinvl in it) against the rules that hold for all of them."""
    yield from form_faults(tree)
    around = parents_of(tree)
    for node, dots, module, name in imports_of(tree):
        top = module.split(".")[0]
        dotted = f"{module}.{name}" if name else module
        if dotted.startswith("torch.distributed"):
            yield f"line {node.lineno}: torch.distributed belongs to training"
        if dots == 0 and top in {"pyramidclip_hf", "conversion", "training", "tests"}:
            yield f"line {node.lineno}: imports {top}"
            continue
        if dots or top in sys.stdlib_module_names | CORE_PACKAGES | HELPERS.keys():
            continue
        if not inside_import_try(node, around[node]):
            yield f"line {node.lineno}: {top} is not a core dependency: import it in a try that catches ImportError"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield f"line {node.lineno}: torch.distributed belongs to training"


def sibling_faults(tree, module_name):
    """Imports of siblings that SIBLINGS does not allow."""
    for node, dots, module, _ in imports_of(tree):
        if module_name not in HELPERS.get(module, {module_name}):
            yield f"line {node.lineno}: {module} is for {' and '.join(sorted(HELPERS[module]))} alone"
        if dots != 1:
            continue
        if module.split(".")[0] == "vinvl":
            yield f"line {node.lineno}: the detector in vinvl/ stands alone"
        elif module_name not in ASSEMBLERS and module not in SIBLINGS[module_name]:
            yield f"line {node.lineno}: {module_name} must not import {module}"


def checkout_faults(tree, forbidden_folder):
    """Faults of a module of `conversion` or `training`: the other folder, and extras at module level."""
    around = parents_of(tree)
    for node, dots, module, _ in imports_of(tree):
        top = module.split(".")[0]
        if dots == 0 and top in {forbidden_folder, "tests"}:
            yield f"line {node.lineno}: imports {top}"
        known = sys.stdlib_module_names | CORE_PACKAGES | CORE_BRINGS | OURS
        outside = not inside_function(around[node]) and not for_types_only(around[node])
        if dots == 0 and top not in known and outside:
            yield f"line {node.lineno}: import {top} in the function that uses it"


def module_name(path):
    """`training/data/order.py` -> training.data.order; a package is named by its folder."""
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted):
    file = CHECKOUT.joinpath(*dotted.split("."))
    return file.is_dir() or file.with_suffix(".py").is_file()


def own_imports(tree, importer):
    """(node, dotted name) for each module of this checkout that `importer` imports, relative ones resolved."""
    for node, dots, module, name in imports_of(tree):
        if dots:
            package = importer if is_package(importer) else importer.rpartition(".")[0]
            module = ".".join(filter(None, [package, module]))
        if module.split(".")[0] in {"pyramidclip_hf", "conversion", "training", "tests"}:
            dotted = f"{module}.{name}" if name else module
            yield node, dotted if is_module(dotted) else module


def is_package(dotted):
    return CHECKOUT.joinpath(*dotted.split("."), "__init__.py").is_file()


def room_of(module):
    """The layer's name of a module of `training` or of the package; None for the folder `training` itself."""
    top, *rest = module.split(".")
    if top != "training":
        return top
    if not rest:
        return None
    return rest[0] if len(rest) > 1 or rest[0] in DEPTH else "commands"


def is_command(module):
    """Whether a module of `training` is one that you can type: `python -m training.NAME`, `training.prepare.NAME`."""
    *folders, _ = module.split(".")
    return folders in (["training"], ["training", "prepare"]) and room_of(module) is not None and not is_package(module)


def layer_faults(tree, importer):
    """Imports of a module of `training` that do not lead down the list of layers."""
    room = room_of(importer)
    if room not in DEPTH:
        yield f"the room {room} has no place in LAYERS"
        return
    for module in sorted({module for _, module in own_imports(tree, importer)}):
        other = room_of(module)
        if is_command(module):
            if (importer, module) not in RUNS_ANOTHER:
                yield f"imports the command {module}"
        elif other not in DEPTH:
            yield f"imports {module}, which has no place in LAYERS"
        elif other != room and DEPTH[other] <= DEPTH[room]:
            yield f"imports {module}, which is not below {room}"


def command_faults(tree):
    """What a command that can be typed as `python -m training.NAME` must have."""
    if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
        yield "has no function main"
    last = tree.body[-1]
    if not isinstance(last, ast.If) or ast.unparse(last.test) != "__name__ == '__main__'":
        yield 'does not end in `if __name__ == "__main__":`'


def hidden_imports(tree, importer):
    """Modules of this checkout that are imported inside of a function, where a reader of the imports misses them."""
    around = parents_of(tree)
    hidden = {module for node, module in own_imports(tree, importer) if inside_function(around[node])}
    yield from (f"imports {module} inside of a function" for module in sorted(hidden))


def circles(imports):
    """The groups of modules that import each other, also through others, from {module: modules that it imports}."""
    reached = {module: set() for module in imports}
    for module, seen in reached.items():
        ahead = [module]
        while ahead:
            new = imports.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
    groups = {
        frozenset(other for other in seen if module in reached.get(other, ())) for module, seen in reached.items()
    }
    return sorted(" <-> ".join(sorted(group)) for group in groups if group)


def test_file_faults(tree, importer):
    """Imports of one test file by another; what they share lies in conftest.py or in a module of helpers."""
    for module in sorted({module for _, module in own_imports(tree, importer)}):
        if module.rpartition(".")[2].startswith("test_"):
            yield f"imports the test file {module}"


test_file_faults.__test__ = False


def assert_no_faults(files, find_faults):
    assert files
    faults = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf8"))
        faults += [f"{path.relative_to(CHECKOUT)}: {fault}" for fault in find_faults(tree, path)]
    assert not faults, "\n".join(faults)


def test_package_modules_keep_the_form_the_hub_copier_needs():
    assert_no_faults(source_files("pyramidclip_hf"), lambda tree, path: package_faults(tree))


def test_siblings_are_imported_downwards_only():
    modules = sorted((CHECKOUT / "pyramidclip_hf").glob("*.py"))
    unplaced = [path.name for path in modules if path.stem not in SIBLINGS.keys() | ASSEMBLERS]
    assert not unplaced, f"give {unplaced} a place in SIBLINGS"
    assert_no_faults(modules, lambda tree, path: sibling_faults(tree, path.stem))


def test_the_loss_takes_only_torch_from_outside():
    tree = ast.parse((CHECKOUT / "pyramidclip_hf" / "loss_pyramidclip.py").read_text(encoding="utf8"))
    tops = {module.split(".")[0] for _, dots, module, _ in imports_of(tree) if not dots}
    assert tops - sys.stdlib_module_names <= {"torch"}


def test_conversion_and_training_do_not_know_each_other():
    assert_no_faults(source_files("conversion"), lambda tree, path: checkout_faults(tree, "training"))
    assert_no_faults(source_files("training"), lambda tree, path: checkout_faults(tree, "conversion"))


def breaks_of_rooms():
    """Each break of the rules of rooms in the checkout, as one line that does not change with line numbers."""
    imports = {}
    for path in source_files("pyramidclip_hf", "conversion", "training"):
        tree, module = ast.parse(path.read_text(encoding="utf8")), module_name(path)
        shown = path.relative_to(CHECKOUT).as_posix()
        imports[module] = {other for _, other in own_imports(tree, module)}
        faults = list(hidden_imports(tree, module))
        if module.startswith("training."):
            faults += layer_faults(tree, module)
            if is_command(module):
                faults += command_faults(tree)
        yield from (f"{shown}: {fault}" for fault in faults)
    yield from (f"circle: {circle}" for circle in circles(imports))
    for path in sorted((CHECKOUT / "tests").rglob("test_*.py")):
        faults = test_file_faults(ast.parse(path.read_text(encoding="utf8")), module_name(path))
        yield from (f"{path.relative_to(CHECKOUT).as_posix()}: {fault}" for fault in faults)


def test_rooms_are_kept():
    found = sorted(breaks_of_rooms())
    assert not found, "\n".join(found)


def test_every_room_has_a_place():
    folders = {path.parent.name for path in (CHECKOUT / "training").glob("*/__init__.py")}
    assert folders == DEPTH.keys() - {"commands", "pyramidclip_hf"}


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("training.loop.checkpoint", "from training.pretrain import main"),
        ("training.loop.checkpoint", "from training import pretrain"),
        ("training.evaluation.sets", "def f():\n    import training.evaluate"),
        ("training.finetune", "from training.pretrain import main"),
        ("training.data.order", "from training.loop.checkpoint import save"),
        ("training.data.order", "from training.evaluation.results import write"),
        ("training.prepare.pack", "from training.loop.checkpoint import save"),
        ("training.evaluation.results", "from training.prepare.sources import open_source"),
        ("training.settings.reading", "from training.prepare.selecting.rules import Rule"),
        ("training.evaluation.sets", "from training.loop.checkpoint import save"),
        ("training.settings.pretraining", "from training.loop.checkpoint import save"),
        ("training.settings.finetuning", "from training.transfer.parts import PARTS"),
        ("training.settings.pretraining", "from training.reports.plots import curve"),
        ("training.loop.checkpoint", "from training.emoji.scenes import Recipe"),
        ("training.data.order", "from conversion.key_map import KEYS"),
        ("training.unknown_room.part", "import json"),
        ("training.prepare.formats.store", "from training.prepare.pack import main"),
        ("training.prepare.detect", "from training.prepare.pack import main"),
    ],
)
def test_layers_fire(importer, source):
    assert len(list(layer_faults(ast.parse(source), importer))) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("training.demo", "from training import pretrain"),
        ("training.pretrain", "from training.loop.checkpoint import save\nfrom training.data.order import SampleOrder"),
        ("training.evaluation.sets", "from training.evaluation.captions import read\nimport pyramidclip_hf"),
        ("training.data.order", "from training.data.records import Sample\nimport json"),
    ],
)
def test_layers_allow_what_leads_down(importer, source):
    assert not list(layer_faults(ast.parse(source), importer))


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ('def main():\n    pass\nif __name__ == "__main__":\n    main()', 0),
        ("def main():\n    pass", 1),
        ('if __name__ == "__main__":\n    print()', 1),
        ("X = 1", 2),
    ],
)
def test_the_rule_of_commands_fires(source, faults):
    assert len(list(command_faults(ast.parse(source)))) == faults


@pytest.mark.parametrize(
    ("importer", "source", "hidden"),
    [
        ("training.demo", "def f():\n    from training import pretrain", "training.pretrain"),
        ("training.data.shards", "def f():\n    import training.data.order", "training.data.order"),
        ("conversion.key_map", "class A:\n    def f(self):\n        import pyramidclip_hf.hub", "pyramidclip_hf.hub"),
        ("pyramidclip_hf.zero_shot", "def f():\n    from .explain import explain_image", "pyramidclip_hf.explain"),
    ],
)
def test_hidden_imports_are_seen(importer, source, hidden):
    assert list(hidden_imports(ast.parse(source), importer)) == [f"imports {hidden} inside of a function"]
    assert not list(hidden_imports(ast.parse("import training.data.order\ndef f():\n    import json"), importer))


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == ["b <-> c", "d"]


def test_an_import_of_a_test_file_is_seen():
    faults = test_file_faults(ast.parse("from tests.test_readme import blocks\nimport json"), "tests.test_packaging")
    assert list(faults) == ["imports the test file tests.test_readme"]
    assert not list(test_file_faults(ast.parse("from tests.hub_server import Repository"), "tests.test_packaging"))


@pytest.mark.parametrize(
    ("find_faults", "source"),
    [
        (package_faults, "from . import loss_pyramidclip"),
        (package_faults, "from ..x import y"),
        (package_faults, "from .vinvl.model import Detector"),
        (package_faults, "from .x import *"),
        (package_faults, "import torch.distributed as dist"),
        (package_faults, "from torch import distributed"),
        (package_faults, "import torch\nworld = torch.distributed.get_world_size()"),
        (package_faults, "def f():\n    from training.data.records import Sample"),
        (package_faults, "import pyramidclip_hf"),
        (package_faults, "def f():\n    import torchvision"),
        (lambda tree: sibling_faults(tree, "loss_pyramidclip"), "from .modeling_pyramidclip import PyramidCLIPModel"),
        (lambda tree: sibling_faults(tree, "__init__"), "from .vinvl import VinVLConfig"),
        (lambda tree: sibling_faults(tree, "zero_shot"), "from filelock import FileLock"),
        (lambda tree: checkout_faults(tree, "training"), "def f():\n    import training.data.records"),
        (lambda tree: checkout_faults(tree, "training"), "import accelerate"),
    ],
)
def test_each_rule_fires(find_faults, source):
    assert len(list(find_faults(ast.parse(source)))) == 1


def test_allowed_forms_pass():
    source = (
        "import json\nfrom .configuration_pyramidclip import PyramidCLIPConfig\n"
        "def f():\n    try:\n        import torchvision\n"
        "    except ImportError as error:\n        raise ImportError('x') from error\n"
    )
    tree = ast.parse(source)
    assert not [
        *package_faults(tree),
        *sibling_faults(tree, "processing_pyramidclip"),
        *checkout_faults(tree, "training"),
        *checkout_faults(ast.parse("if TYPE_CHECKING:\n    from datasets import Dataset"), "training"),
    ]
