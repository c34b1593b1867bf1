"""Packaging: everything stands in settings.ini, this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read_string((root / "settings.ini").read_text(encoding="utf-8"))
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=split(cfg["keywords"]),
    license_expression=cfg["license"],
    license_files=["LICENSE"],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["weights/**/*", "*.js", "*.json"]},
    include_package_data=False,
    install_requires=split(cfg["requirements"]),
    extras_require={"dev": split(cfg["dev_requirements"])},
    entry_points={"nbdev": [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},
)
