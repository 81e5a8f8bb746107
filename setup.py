"Everything about the package stands in settings.ini; this file only hands it to setuptools."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]



def readable_anywhere(text):
    "README.md as PyPI shows it: what lies in the repository is linked as a whole address."
    repo, branch = cfg["git_url"], cfg["branch"]
    inside = r"\((?!https?:|#)([^)]+)\)"
    text = re.sub(rf"(!\[[^]]*\]){inside}", rf"\1({repo}/raw/{branch}/\2)", text)
    text = re.sub(rf"(?<!!)(\[[^]]*\]){inside}", rf"\1({repo}/blob/{branch}/\2)", text)
    return re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)


extras = {
    name: cfg[f"{name}_requirements"].split()
    for name in ("diffusers", "metrics", "audit", "baselines", "notebook", "peers")
}
extras["dev"] = cfg["dev_requirements"].split() + sum(extras.values(), [])
extras["bench"] = (
    cfg["bench_requirements"].split() + extras["diffusers"]
)  # the peers that timings are compared with

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readable_anywhere(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=cfg["classifiers"].strip().split("\n"),
    project_urls={
        "Documentation": f"{cfg['git_url']}#the-book",
        "Source": cfg["git_url"],
        "Issues": f"{cfg['git_url']}/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2409.07025",
    },
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    # data/ travels inside the package as cpsample/_files
    packages=[*find_packages(include=["cpsample", "cpsample.*"]), "cpsample._files"],
    package_dir={"cpsample._files": "data"},
    package_data={
        "cpsample": ["py.typed"],
        "cpsample.judgement": ["templates/*"],  # of the report, to be edited by people
        "cpsample._files": ["**/*.json", "**/*.safetensors", "**/*.xz", "**/README.md"],
    },
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
)
