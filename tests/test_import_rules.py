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
CORE_BRINGS = {"tqdm", "yaml", "fsspec", "packaging", "regex"}

# Each module of the package and the siblings it may import. A new module gets its place here first.
TOWERS = {"configuration_pyramidclip", "loss_pyramidclip"}
PARTS = {"modeling_pyramidclip_text", "modeling_pyramidclip_resnet"}
MODEL = TOWERS | PARTS | {"modeling_pyramidclip_vit"}
PREPROCESSING = {"configuration_pyramidclip", "image_processing_pyramidclip", "tokenization_pyramidclip"}
SIBLINGS = {
    "configuration_pyramidclip": set(),
    "loss_pyramidclip": {"configuration_pyramidclip"},
    "modeling_pyramidclip_text": TOWERS,
    "modeling_pyramidclip_resnet": TOWERS | {"modeling_pyramidclip_text"},
    "modeling_pyramidclip_vit": TOWERS | PARTS,
    "modeling_pyramidclip": MODEL,
    "fusion_pyramidclip": MODEL | {"modeling_pyramidclip"},
    "explain": MODEL | {"modeling_pyramidclip"},
    "image_processing_pyramidclip": {"configuration_pyramidclip"},
    "tokenization_pyramidclip": {"configuration_pyramidclip"},
    "processing_pyramidclip": PREPROCESSING,
    "zero_shot": PREPROCESSING | {"processing_pyramidclip"},
    "embedding_files": set(),
    "picture_files": {"image_processing_pyramidclip", "embedding_files"},
}
# These put the parts together and may import any sibling.
ASSEMBLERS = {"__init__", "hub", "cli"}


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
        if dots or top in sys.stdlib_module_names or top in CORE_PACKAGES:
            continue
        if not inside_import_try(node, around[node]):
            yield f"line {node.lineno}: {top} is not a core dependency: import it in a try that catches ImportError"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield f"line {node.lineno}: torch.distributed belongs to training"


def sibling_faults(tree, module_name):
    """Imports of siblings that section 2 does not allow. `fuse()` and the like import upwards inside a function."""
    around = parents_of(tree)
    for node, dots, module, _ in imports_of(tree):
        if dots != 1:
            continue
        if module.split(".")[0] == "vinvl":
            yield f"line {node.lineno}: the detector in vinvl/ stands alone"
        elif (
            module_name not in ASSEMBLERS and module not in SIBLINGS[module_name] and not inside_function(around[node])
        ):
            yield f"line {node.lineno}: {module_name} must not import {module}"


def checkout_faults(tree, forbidden_folder):
    """Faults of a module of `conversion` or `training`: the other folder, and extras at module level."""
    around = parents_of(tree)
    for node, dots, module, _ in imports_of(tree):
        top = module.split(".")[0]
        if dots == 0 and top in {forbidden_folder, "tests"}:
            yield f"line {node.lineno}: imports {top}"
        known = sys.stdlib_module_names | CORE_PACKAGES | CORE_BRINGS | {"pyramidclip_hf", "conversion", "training"}
        if dots == 0 and top not in known and not inside_function(around[node]):
            yield f"line {node.lineno}: import {top} in the function that uses it"


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
    ]
