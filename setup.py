"""Maps the folders kernels/ and formats/ to the packages cloq_export.kernels and cloq_export.formats."""

from setuptools import find_packages, setup

MAPPED = ("kernels", "formats")

setup(
    packages=find_packages(include=["cloq_export", "cloq_export.*"])
    + [f"cloq_export.{name}" for folder in MAPPED for name in find_packages(include=[folder, f"{folder}.*"])],
    package_dir={f"cloq_export.{folder}": folder for folder in MAPPED},
    package_data={"": ["py.typed", "*.md", "*.json", "*.yaml", "golden/**/*", "golden/*"]},
)
