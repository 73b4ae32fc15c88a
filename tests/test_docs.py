"""What README and docs name exists: links, files, flags, tests. The commands are run by test_docs_commands.py."""

import re

import pytest

from tests.documents import PAGES, make_targets, prose
from tests.launch import ROOT
from tests.parsers import all_flags

# Flags of torchrun, accelerate, Slurm and sbatch
LAUNCHERS = {
    "nnodes", "nproc_per_node", "nproc-per-node", "rdzv_id", "rdzv_endpoint", "rdzv_backend", "max-restarts", "standalone",
    "signals-to-handle", "shutdown-timeout", "num_processes", "main_process_port", "multi_gpu", "signal", "requeue", "time",
    "array",
}  # fmt: skip
# Files that runs, users and others make
MADE = re.compile(
    r"(RUNS|SAMPLES|DATA|DIGITS|results|demo_output|imagenet|checkpoints|VIRTUAL_|admnet_|weights-|classify_|ILSVRC|transformer|vae"
    r"|edt-s\.pt|edt-xl\.pt|REF|FILE|MODULE|OUT|CKPT|<)"
)
# What runs leave in their folders
LEFT = {
    "metrics.jsonl", "loss.png", "settings.json", "meta.json", "facts.pt", "switch_steps.csv", "log_likelihood.csv",
    "metrics.json", "metrics_mediators.json", "metrics_compare.json", "metrics_steps.json", "samples.png", "samples_amm.png",
    "samples_switching.png", "samples-trajectory.png", "training_curve.png", "compare.png", "steps.png", "latents.npy",
    "labels.npy", "inferance_edt.py", "evaluation.png",
}  # fmt: skip


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page.name} links to {link}"


def quoted(page) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags(page):
    """Every --flag is one of some script's, or of a launcher's."""
    for text in quoted(page):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
            assert flag in LAUNCHERS or flag.replace("_", "-") in all_flags(), f"{page.name}: --{flag} in `{text}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files(page):
    """Every file or folder with a suffix or a slash lies in the repository, but for what runs leave."""
    names = {path.name for path in [*ROOT.glob("*.*"), *ROOT.glob("[a-z]*/*.*"), *ROOT.glob("[a-z]*/*/*.*")]}
    for text in quoted(page):
        for word in text.split():
            name = word.strip("(),.:")
            if not re.fullmatch(r"[\w./-]+\.(py|md|sh|sbatch|png|jsonl?|csv|npy|txt|yml|cff)", name):
                continue
            known = (ROOT / name).exists() or (page.parent / name).exists() or ("/" not in name and name in names)
            assert known or name in LEFT or MADE.match(name), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_targets(page):
    for text in quoted(page):
        if text.startswith("make "):
            for target in text.split(" && ")[0].split()[1:]:
                assert target in make_targets(), f"{page.name}: {text}"
