"""Publish the champion's exports to a folder or a bucket.

    kd promote --publish /srv/models          # or s3://bucket/models, with s3fs installed

Each bundle goes to a folder of its own, named by its checksum, which is never written to again
once complete.  champion.json names the champion's folders and is replaced last, in one step, so
its readers find either the old champion's bundles or the new one's, complete.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from kd.bundle import checksums
from kd.tracking import Run, Version

POINTER = "champion.json"


def champion(run: Run, registered_name: str, url: str) -> str:
    """Publish the champion's exports at `url`, and point champion.json at them.

    Args:
        run: Any run with a registry.
        registered_name: The registered model.
        url: A folder, or any URL that fsspec can write to.

    Returns:
        What was done, in a line.

    Raises:
        TrackingError: MLflow does not answer.
        ArtifactError: a downloaded bundle is damaged; nothing changed for readers.
        OSError: `url` cannot be written to.
    """
    version = run.champion(registered_name)
    uris = exports(version) if version else {}
    if version is None or not uris:
        return f"nothing published at {url}: the champion has no exports yet"
    place = Place(url)
    known = place.read()
    if known.get("models") == uris and place.holds(known):
        return f"version {version.number} is published at {url} already"
    folders = {name: place.add(run.fetch(uri, run.scratch())) for name, uri in uris.items()}
    place.point(
        {
            "name": registered_name,
            "version": version.number,
            "sha256": version.sha256,
            "exports": folders,
            "models": uris,
        }
    )
    return f"published version {version.number} at {url}: {', '.join(sorted(folders))}"


def exports(version: Version) -> dict[str, str]:
    """The MLflow URIs of a version's exports, by name."""
    tags = {key.removeprefix("kd.export."): uri for key, uri in version.tags.items()}
    return {
        name: uri
        for name, uri in sorted(tags.items())
        if f"kd.export.{name}" in version.tags and not name.endswith(".sha256")
    }


class Place:
    """Where bundles are published."""

    def __init__(self, url: str) -> None:
        """Args: url: A folder's path, or a URL that fsspec knows."""
        self.files, root = url_to_fs(url)
        self.root = root.rstrip("/")

    def read(self) -> dict[str, Any]:
        """What champion.json holds; empty if there is none."""
        path = f"{self.root}/{POINTER}"
        if not self.files.exists(path):
            return {}
        record: dict[str, Any] = json.loads(self.files.cat_file(path))
        return record

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether every bundle that a champion.json names is here, complete."""
        return all(self._is_whole(folder) for folder in record["exports"].values())

    def add(self, bundle: Path) -> str:
        """Copy a bundle, SHA256SUMS last; return its folder's name."""
        names = [*checksums.check(bundle), checksums.SUMS]
        folder = hashlib.sha256((bundle / checksums.SUMS).read_bytes()).hexdigest()[:32]
        if not self._is_whole(folder):
            for name in names:
                target = f"{self.root}/{folder}/{name}"
                self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(bundle / name), target)
        return folder

    def point(self, record: dict[str, Any]) -> None:
        """Replace champion.json."""
        text = json.dumps(record, indent=2) + "\n"
        self.files.pipe_file(f"{self.root}/.{POINTER}", text.encode())
        self.files.mv(f"{self.root}/.{POINTER}", f"{self.root}/{POINTER}")

    def _is_whole(self, folder: str) -> bool:
        return bool(self.files.exists(f"{self.root}/{folder}/{checksums.SUMS}"))
