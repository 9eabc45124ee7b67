"""The file of a log: one row per commit, in SQLite, for one process at a time.

::

    log(seq INTEGER PRIMARY KEY, records BLOB)    row 0: `Meta`; from row 1 on: a commit each

Rules:

1. Nothing here is overwritten that is not ours: another program's database, a file that is none, a
   newer format, a damaged file are refused, in one line that names the file and the way out.
2. A commit is whole or not at all. One that fails leaves the file as it was.
3. Every method blocks, on a disk: call it in a thread, one at a time.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from broker.config.engine_url import Sync
from broker.engines.records import FORMAT, BadRecord, Meta, decode_meta, encode
from broker.errors import ConfigError

APPLICATION_ID: Final = 0x74726C67
"""Says whose file it is, at a place of its own in SQLite's header: "trlg"."""

BUSY_SECONDS: Final = 1.0
"""How long to wait for a process that ends just now; another broker keeps its file for good."""

PAGE_BYTES: Final = 16 * 2**10
"""Of a new file. A commit of 256 publications is 4 pages instead of 11, each two writes and a checksum; a lone
one is a page, whose size the disk does not notice. A file keeps the size with which it was made, until it is
compacted."""

WAL_BYTES: Final = 4 * 2**20
"""So much is written beside the file until SQLite moves it into the file, and begins anew there."""

DELETE_ROWS: Final = 1000
"""Rows in one delete at most: small ones are many."""


class NotWritten(Exception):
    """A commit has failed, and left nothing behind. The message is SQLite's."""


class LogFile:
    """A log that is open, and nobody else's meanwhile."""

    def __init__(self, path: Path, db: sqlite3.Connection, meta: Meta) -> None:
        self.path = path
        self.meta: Meta = meta
        """As it stands in the file."""
        self._db = db
        self.last_seq: int
        self.bytes: int
        self.last_seq, self.bytes = self._measure()

    @classmethod
    def open(cls, path: Path, sync: Sync, *, must_exist: bool = False) -> "LogFile":
        """Open a log, or make a new one that only its owner may read. Raises `ConfigError`."""
        try:
            if not must_exist:
                os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            elif not path.exists():
                raise ConfigError(f"{path}: there is no such file")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            if not path.parent.exists():
                reason = f"there is no directory {path.parent}; make it, or name another file"
            raise ConfigError(f"engine: {path} cannot be opened: {reason}") from error
        try:
            db = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise ConfigError(_why_not(path, error)) from error
        try:
            return cls(path, db, _prepare(path, db, sync))
        except (sqlite3.Error, BadRecord) as error:
            db.close()
            raise ConfigError(_why_not(path, error)) from error
        except BaseException:
            db.close()
            raise

    def mark(self) -> None:
        """Say in the file that it has the format of this version, so that no older one takes it for its own.
        Raises `NotWritten`."""
        try:
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                self._db.execute(f"PRAGMA user_version = {FORMAT}")
        except sqlite3.Error as error:
            raise NotWritten(str(error)) from error

    def rows(self) -> Iterator[bytes]:
        """The commits in their order. Raises `ConfigError` for a damaged file."""
        try:
            query = "SELECT records FROM log WHERE seq > 0 ORDER BY seq"
            for (row,) in self._db.execute(query):
                if not isinstance(row, bytes):
                    raise BadRecord("a row holds no bytes")
                yield row
        except (sqlite3.Error, BadRecord) as error:
            raise ConfigError(_why_not(self.path, error)) from error

    def reserve(self) -> None:
        """Make what SQLite writes beside the file as long as it will be. A commit that makes it longer waits
        for the disk to note the new length, too: twice as long. Raises nothing: it is only slower without."""
        with suppress(OSError):
            # Opened anew, which an advisory lock would not survive; SQLite has those on the file itself.
            wal = os.open(f"{self.path}-wal", os.O_WRONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(wal).st_size
                more = max(0, WAL_BYTES - size)
                try:
                    done = os.pwrite(wal, bytes(more), size)
                except OSError:
                    done = 0
                if done < more:
                    os.ftruncate(wal, size)  # the last room of a disk is for what is published
            finally:
                os.close(wal)

    def append(self, row: bytes, meta: Meta | None = None) -> None:
        """Commit a row, if it is not empty, and other meta, if given. Raises `NotWritten`."""
        try:
            if meta is not None:  # else the one statement is a commit by itself
                self._db.execute("BEGIN IMMEDIATE")
            if row:
                self._db.execute("INSERT INTO log VALUES (?, ?)", (self.last_seq + 1, row))
            if meta is not None:
                self._db.execute("INSERT OR REPLACE INTO log VALUES (0, ?)", (encode(meta),))
                self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise NotWritten(str(error)) from error
        self.meta = meta or self.meta
        if row:
            self.last_seq += 1
            self.bytes += len(row)

    def append_durably(self, row: bytes, meta: Meta) -> None:
        """The same, and not before the disk has it, whatever `sync` says. Raises `NotWritten`."""
        (before,) = self._db.execute("PRAGMA synchronous").fetchone()
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            self.append(row, meta)
        finally:
            self._db.execute(f"PRAGMA synchronous = {before}")

    def delete(self, up_to: int, most: int) -> bool:
        """Delete the first rows up to this one, `most` bytes of them and one row at least; whether
        that was all. Raises `NotWritten`."""
        query = (
            "SELECT seq, length(records) FROM log WHERE seq BETWEEN 1 AND ? ORDER BY seq LIMIT ?"
        )
        size, last = 0, 0
        try:
            for seq, length in self._db.execute(query, (up_to, DELETE_ROWS)).fetchall():
                if size and size + length > most:
                    break
                size, last = size + length, seq
            self._db.execute("DELETE FROM log WHERE seq BETWEEN 1 AND ?", (last,))
        except sqlite3.Error as error:
            self._roll_back()
            raise NotWritten(str(error)) from error
        self.bytes -= size
        return not last or last == up_to

    def problems(self) -> list[str]:
        """The faults that SQLite finds in the file; none for one that is whole."""
        try:
            found = [text for (text,) in self._db.execute("PRAGMA integrity_check")]
        except sqlite3.Error as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def shrink(self) -> None:
        """Give back to the file system what the file does not use. Raises `NotWritten`."""
        try:
            # Pages get another size only while there is no log beside the file.
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            raise NotWritten(str(error)) from error

    def close(self, meta: Meta | None = None) -> None:
        """Close the file, with this as its meta. Raises nothing: what fails is found at the next
        start."""
        try:
            if meta is not None:
                with suppress(NotWritten):
                    self.append_durably(b"", meta)
        finally:
            with suppress(sqlite3.Error):
                self._db.close()

    def _measure(self) -> tuple[int, int]:
        query = "SELECT coalesce(max(seq), 0), coalesce(sum(length(records)), 0) FROM log"
        last, size = self._db.execute(f"{query} WHERE seq > 0").fetchone()
        return last, size

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # SQLite has done it itself where the disk is full
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")


def _prepare(path: Path, db: sqlite3.Connection, sync: Sync) -> Meta:
    """Take the file for this process, and read or write what says that it is ours."""
    # Before anything is read: so there is no shared memory beside the file, and a process that is
    # killed leaves no lock.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID and (application or version or tables):
        raise ConfigError(f"engine: {path} is a database of another program; name another file")
    if version > FORMAT:
        raise ConfigError(
            f"engine: {path} has format {version}, and this version knows {FORMAT}; "
            "start the version that has written it, or name another file"
        )
    if application != APPLICATION_ID:
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL")
    (page,) = db.execute("PRAGMA page_size").fetchone()
    db.execute(f"PRAGMA wal_autocheckpoint = {WAL_BYTES // page}")
    db.execute("PRAGMA fullfsync = 1")  # macOS: fsync alone leaves it in the disk's cache
    db.execute(f"PRAGMA synchronous = {'FULL' if sync == 'power' else 'NORMAL'}")
    db.execute("BEGIN EXCLUSIVE")
    if application != APPLICATION_ID:
        db.execute("CREATE TABLE log (seq INTEGER PRIMARY KEY, records BLOB NOT NULL)")
        db.execute("INSERT INTO log VALUES (0, ?)", (encode(Meta()),))
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
    db.execute("COMMIT")
    row = db.execute("SELECT records FROM log WHERE seq = 0").fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise BadRecord("its first row is missing")
    return decode_meta(row[0])


def damaged(path: Path, error: Exception) -> str:
    """The line to say about a file that is ours and cannot be read."""
    return (
        f"engine: {path} is damaged: {error}; put a copy in its place, or name another file; "
        f"`python -m broker engine check {path}` tells more"
    )


def _why_not(path: Path, error: Exception) -> str:
    """The line to say about a file that cannot be used."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        text = "is in use by another process; stop that, or name another file"
    elif code == sqlite3.SQLITE_NOTADB:
        text = "is not a database; name another file"
    elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        text = f"cannot be written: {error}; its directory must be writable, too"
    elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        text = f"cannot be used: {error}"
    else:
        return damaged(path, error)
    return f"engine: {path} {text}"
