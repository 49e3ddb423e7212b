"""Blobs through obstore: local disk here, an object store by the same interface.

A blob survives a power cut once ``put`` and then ``sync`` have returned. obstore's local backend writes to a temporary
file and renames it, but leaves flushing to the operating system: ``put`` flushes the file, and ``sync`` flushes the
folders that name it, once for all blobs of a batch.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path, PurePath

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from client_sdk.protocol.errors import ConfigurationError, StorageUnavailable, UnknownBlob


class BlobStore:
    """Bytes by key under one folder.

    Args:
        root: Folder, created if needed.
        quota_bytes: Largest total size; None for no limit.

    Raises:
        ConfigurationError: The folder cannot be created.
    """

    def __init__(self, root: Path, quota_bytes: int | None = None) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigurationError(f"cannot create {root}: {e.strerror or e}; choose another data_dir") from e
        self._root = root
        self._store = LocalStore(prefix=root, mkdir=True)
        self._quota = quota_bytes
        self._lock = threading.Lock()
        self._used = 0
        if quota_bytes is not None:
            self._used = sum(meta["size"] for batch in obstore.list(self._store) for meta in batch)
        self._unflushed: set[str] = set()

    @staticmethod
    def content_key(sha256: str) -> str:
        """Key of a content-addressed blob."""
        return f"content/{sha256[:2]}/{sha256}"

    def put(self, key: str, data: bytes) -> None:
        """Write the bytes and flush them; replaces what was there. Durable after the next ``sync``.

        Raises:
            StorageUnavailable: The quota is reached, the disk is full or failing. Nothing is left behind.
        """
        self._reserve(len(data))
        try:
            obstore.put(self._store, key, data)
            _flush(f"{self._root}/{key}", os.O_RDONLY)
            with self._lock:
                self._unflushed.add(key.rpartition("/")[0])
        except (BaseError, OSError) as e:
            self._reserve(-len(data))
            self.delete(key)
            raise StorageUnavailable(f"cannot store {len(data)} bytes: {_reason(e)}") from e

    def put_file(self, key: str, file: Path) -> None:
        """Give a flushed file of the same disk another name; replaces what was there. Durable after the next ``sync``.

        Raises:
            StorageUnavailable: The quota is reached, or the disk is failing. The file is left as it is.
        """
        path = self._root / key
        try:
            size = file.stat().st_size
            self._reserve(size)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                os.link(file, path)
            except OSError:
                self._reserve(-size)
                raise
        except OSError as e:
            raise StorageUnavailable(f"cannot store {file.name}: {_reason(e)}") from e
        with self._lock:
            self._unflushed.add(key.rpartition("/")[0])

    def sync(self) -> None:
        """Flush the folders of all blobs put so far.

        Raises:
            StorageUnavailable: The disk fails; the next call tries again.
        """
        with self._lock:
            folders, self._unflushed = self._unflushed, set()
        try:
            # A folder's own name is an entry too: up to the root, longest path first.
            paths = {p for f in folders if f for p in (PurePath(f), *PurePath(f).parents)}
            for path in sorted(paths, key=lambda p: -len(p.parts)):
                _flush(f"{self._root}/{path}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as e:
            with self._lock:
                self._unflushed |= folders
            raise StorageUnavailable(f"cannot flush the blobs' folders: {_reason(e)}") from e

    def put_content(self, data: bytes) -> str:
        """Write under the content's SHA-256 and return it (hex); a no-op when it is there."""
        sha256 = hashlib.sha256(data).hexdigest()
        key = self.content_key(sha256)
        if not self.exists(key):
            self.put(key, data)
        return sha256

    def get(self, key: str) -> memoryview:
        """All bytes of a blob.

        Raises:
            UnknownBlob: No such key.
            StorageUnavailable: The disk fails.
        """
        try:
            return memoryview(obstore.get(self._store, key).bytes())
        except (FileNotFoundError, obstore.exceptions.NotFoundError) as e:
            raise UnknownBlob(f"no blob {key.rsplit('/', 1)[-1]}") from e
        except (BaseError, OSError) as e:
            raise StorageUnavailable(f"cannot read a blob: {_reason(e)}") from e

    def get_content(self, sha256: str) -> memoryview:
        """A content-addressed blob, checked against its hash."""
        data = self.get(self.content_key(sha256))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageUnavailable(f"blob {sha256} is damaged on disk")
        return data

    def exists(self, key: str) -> bool:
        """Whether a blob is there."""
        try:
            obstore.head(self._store, key)
        except (FileNotFoundError, obstore.exceptions.NotFoundError):
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """All keys under a prefix."""
        return [meta["path"] for batch in obstore.list(self._store, prefix) for meta in batch]

    def delete(self, key: str) -> None:
        """Remove a blob; a no-op when it is not there."""
        try:
            # Only a quota needs to know how much becomes free.
            size = 0 if self._quota is None else obstore.head(self._store, key)["size"]
            obstore.delete(self._store, key)
        except (BaseError, OSError):
            return
        self._reserve(-size)

    def _reserve(self, num_bytes: int) -> None:
        with self._lock:
            if self._quota is not None and num_bytes > 0 and self._used + num_bytes > self._quota:
                raise StorageUnavailable(f"the blob quota of {self._quota} bytes is reached")
            self._used += num_bytes


def _flush(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """First line of an error: storage backends append debug dumps with paths."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
