"""The states of a folder that a power failure may leave, from the record of the calls that changed it (shim.c).

A file system keeps what was synced: the bytes of a file by fsync of the file, the names in a folder by fsync of the
folder. Of everything else it may keep or lose any part. `states` yields, for each prefix of the record, combinations of

- bytes of files: all are kept, or those that were not synced are lost;
- names (creations, renames, removals): all are kept; all that were not synced are lost; each one of them is lost; each
  one of them is kept alone.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Node:
    """A file with its bytes, or a folder."""

    is_folder: bool
    data: bytes = b""
    synced: bytes = b""
    key: int = 0  # of `data`


@dataclass
class Name:
    """A change of names: `moves` are (folder, name, node or None) to set, in order."""

    kind: str
    source: tuple[int, str]
    target: tuple[int, str]
    node: int
    synced: bool = False


@dataclass
class State:
    """`calls`: the length of the prefix; `complete`: paths of folders that were renamed and synced, in order."""

    calls: int
    what: str
    files: dict[str, bytes]
    folders: list[str]
    complete: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)

    def write(self, folder):
        for name in self.folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def read(record, folder):
    """The calls of a record: (call, number, path, path, bytes), paths relative to the folder."""
    raw, at, calls = Path(record).read_bytes(), 0, []
    while at < len(raw):
        end = raw.index(b"\n", at)
        call, number, size, *paths = raw[at:end].decode().split("\t")
        at = end + 1 + int(size)
        paths = [path[len(str(folder)) + 1 :] if path.startswith(f"{folder}/") else path for path in paths]
        paths = ["" if path == str(folder) else path for path in paths]
        calls.append((call, int(number), *paths, raw[end + 1 : at]))
    return calls


class Disk:
    """The folder before the record, and the calls so far. Folder 0 is the folder itself, which is on the disk."""

    def __init__(self, folder):
        self.nodes, self.start, self.names = [Node(True)], {0: {}}, []
        for path in sorted(folder.rglob("*")):
            data = b"" if path.is_dir() else path.read_bytes()
            node = self._new(path.is_dir(), data, data)
            parent, name = self._place(str(path.relative_to(folder)), self.start)
            self.start[parent][name] = node
            if path.is_dir():
                self.start[node] = {}
        self.tree = self._copy(self.start)
        self.complete, self.begun = [], []

    def _new(self, is_folder, data=b"", synced=b""):
        self.nodes.append(Node(is_folder, data, synced))
        return len(self.nodes) - 1

    @staticmethod
    def _copy(tree):
        return {number: dict(entries) for number, entries in tree.items()}

    @staticmethod
    def _place(path, tree):
        folder, *rest = 0, *path.split("/")
        for name in rest[:-1]:
            folder = tree[folder][name]
        return folder, rest[-1]

    def _node(self, path):
        if path == "":
            return 0
        folder, name = self._place(path, self.tree)
        return self.tree[folder][name]

    def do(self, call, number, path, other, data):
        """Apply a call; whether it changed a name or bytes."""
        if path.endswith(" (deleted)"):
            return False
        if call == "write":
            node = self.nodes[self._node(path)]
            before = node.data.ljust(number, b"\0")
            node.data = before[:number] + data + before[number + len(data) :]
        elif call == "truncate":
            node = self.nodes[self._node(path)]
            node.data = node.data[:number].ljust(number, b"\0")
        elif call == "sync":
            self._sync(self._node(path), path)
        else:
            self._name(call, path, other)
        return True

    def _sync(self, number, path):
        node = self.nodes[number]
        if not node.is_folder:
            node.synced = node.data
            return
        for name in self.names:
            if number in (name.source[0], name.target[0]):
                name.synced = True
        self.complete += [each for each in self.begun if each.rpartition("/")[0] == path and each not in self.complete]

    def _name(self, call, path, other):
        source = self._place(path, self.tree)
        if call in ("create", "mkdir"):
            node = self._new(call == "mkdir")
            change = Name("link", source, source, node)
        elif call == "unlink":
            change = Name(call, source, source, self.tree[source[0]][source[1]])
        else:
            target = self._place(other, self.tree)
            change = Name(call, source, target, self.tree[source[0]][source[1]])
            self.begun.append(other)
        self.names.append(change)
        self._apply(self.tree, change)

    def _apply(self, tree, change):
        """A change whose source another state does not have is left out."""
        (folder, name), (to, new) = change.source, change.target
        for number in (folder, to):
            tree.setdefault(number, {})
        if change.kind == "link":
            tree[folder][name] = change.node
        elif change.kind == "unlink":
            if tree[folder].get(name) == change.node:
                del tree[folder][name]
        elif tree[folder].get(name) == change.node:
            moved = tree[folder].pop(name)
            replaced = tree[to].pop(new, None)
            tree[to][new] = moved
            if change.kind == "exchange" and replaced is not None:
                tree[folder][name] = replaced

    def choices(self):
        """(what is lost, the changes of names that are kept) of this moment."""
        pending = [number for number, name in enumerate(self.names) if not name.synced]
        everything = set(range(len(self.names)))
        yield "no name lost", everything
        if pending:
            yield "all names lost", everything - set(pending)
        for number in pending if len(pending) > 1 else []:
            name = f"{self.names[number].kind} {self.names[number].target[1]}"
            yield f"lost: {name}", everything - {number}
            yield f"kept alone: {name}", everything - set(pending) | {number}

    def states(self, calls):
        for what, kept in self.choices():
            tree = self._copy(self.start)
            for number, change in enumerate(self.names):
                if number in kept:
                    self._apply(tree, change)
            for lost in (False, True):
                files, folders = {}, []
                self._walk(tree, 0, "", lost, files, folders)
                text = f"{what}, {'bytes lost' if lost else 'bytes kept'}"
                yield State(calls, text, files, folders, list(self.complete), list(self.begun))

    def _walk(self, tree, number, path, lost, files, folders):
        for name, child in tree.get(number, {}).items():
            where = f"{path}/{name}" if path else name
            if self.nodes[child].is_folder:
                folders.append(where)
                self._walk(tree, child, where, lost, files, folders)
            else:
                files[where] = self.nodes[child].synced if lost else self.nodes[child].data


def states(folder, calls):
    """Each state once, of all prefixes; the states of the whole record come last."""
    disk, seen = Disk(folder), set()
    for number, call in enumerate(calls, 1):
        if not disk.do(*call) and number < len(calls):
            continue
        for state in disk.states(number):
            done = number == len(calls)
            parts = tuple(sorted(state.files.items())), tuple(sorted(state.folders))  # bytes keep their hash
            key = hash((*parts, tuple(state.complete), done))
            if key not in seen:
                seen.add(key)
                yield state
