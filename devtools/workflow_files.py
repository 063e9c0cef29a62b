"""Workflows as files: one description, written as the page saves it and as the server's API takes it.

A `Workflow` is a list of nodes with their inputs and places on the canvas. What the nodes' inputs are called, which of
them are widgets and in what order comes from the server's own ``/object_info``, so that both files agree with it::

    flow = Workflow("Edit one part", server.object_info())
    loader = flow.node("PartsWorldLoader", at=(0, 0))
    flow.node("CLIPTextEncode", at=(300, 0), clip=loader[1], text="a red figure")
    flow.page()  # for example_workflows/
    flow.api()   # for example_workflows/api/
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Json = dict[str, Any]

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
AFTER_GENERATE = "fixed"
SAVED_FORMAT = 0.4
PACK_ID, CORE_ID = "scalpel-part-editing", "comfy-core"


class Link(NamedTuple):
    """An output of a node, as another node's input."""

    node: int
    slot: int


@dataclass
class Node:
    """One node: what it is, its inputs (values and links), and where it stands."""

    number: int
    kind: str
    title: str
    at: tuple[int, int]
    size: tuple[int, int]
    inputs: dict[str, Any]
    properties: Json = field(default_factory=dict)

    def __getitem__(self, slot: int) -> Link:
        return Link(self.number, slot)


class Workflow:
    """A graph that is built node by node and then written in both formats. ``info`` is the server's object_info."""

    def __init__(self, name: str, info: Json) -> None:
        self.name = name
        self.info = info
        self.nodes: list[Node] = []
        self.notes: list[Node] = []
        self.groups: list[Json] = []

    def node(
        self,
        kind: str,
        *,
        at: tuple[int, int],
        size: tuple[int, int] = (270, 60),
        title: str = "",
        properties: Json | None = None,
        **inputs: Any,
    ) -> Node:
        """Add a node. ``inputs`` are links and values; widgets that are not given take their defaults.

        ValueError on an input that the node does not have.
        """
        unknown = set(inputs) - set(self._specs(kind))
        if unknown:
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}")
        defaults = {name: default_of(spec) for name, spec in self._specs(kind).items() if is_widget(spec)}
        ordered = {name: {**defaults, **inputs}.get(name) for name in self._specs(kind)}
        given = {name: value for name, value in ordered.items() if value is not None}
        self.nodes.append(Node(self._next_number(), kind, title, at, size, given, properties or {}))
        return self.nodes[-1]

    def note(self, text: str, *, at: tuple[int, int], size: tuple[int, int], title: str = "Note") -> None:
        """Add a text to the page; the server never sees it."""
        self.notes.append(Node(self._next_number(), "MarkdownNote", title, at, size, {"text": text}))

    def group(self, title: str, *, at: tuple[int, int], size: tuple[int, int], colour: str = "#3f789e") -> None:
        """Draw a frame with a title behind the nodes."""
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [*at, *size],
                "color": colour,
                "font_size": 24,
                "flags": {},
            }
        )

    def api(self) -> Json:
        """The workflow as POST /prompt takes it."""
        return {
            str(node.number): {
                "class_type": node.kind,
                "inputs": {name: _api_value(value) for name, value in node.inputs.items()},
                "_meta": {"title": node.title or self._display_name(node.kind)},
            }
            for node in self.nodes
        }

    def page(self) -> Json:
        """The workflow as the page saves it."""
        links: list[list[Any]] = []
        sockets = {node.number: self._sockets(node, links) for node in self.nodes}
        nodes = [self._saved_node(node, order, sockets, links) for order, node in enumerate(self.nodes)]
        nodes += [_saved_note(note, len(nodes) + i) for i, note in enumerate(self.notes)]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{self.name}")),
            "revision": 0,
            "last_node_id": max(node["id"] for node in nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.85, "offset": [490, 110]}},
            "version": SAVED_FORMAT,
        }

    # ---- how

    def _next_number(self) -> int:
        return len(self.nodes) + len(self.notes) + 1

    def _specs(self, kind: str) -> dict[str, Any]:
        """The inputs of a node, by name, in order."""
        groups = self.info[kind]["input"]
        return {**groups.get("required", {}), **groups.get("optional", {})}

    def _display_name(self, kind: str) -> str:
        return str(self.info[kind]["display_name"] or kind)

    def _sockets(self, node: Node, links: list[list[Any]]) -> list[Json]:
        """The input sockets as saved: links first, then the widgets, which are sockets as well."""
        specs = self._specs(node.kind)
        sockets: list[Json] = []
        for name in sorted(specs, key=lambda name: is_widget(specs[name])):
            spec, value = specs[name], node.inputs.get(name)
            socket: Json = {"name": name, "type": "COMBO" if isinstance(spec[0], list) else spec[0], "link": None}
            if name in self.info[node.kind]["input"].get("optional", {}):
                socket["shape"] = 7
            if is_widget(spec):
                socket["widget"] = {"name": name}
            if isinstance(value, Link):
                socket["link"] = len(links) + 1
                source = next(other for other in self.nodes if other.number == value.node)
                kind = self.info[source.kind]["output"][value.slot]
                links.append([socket["link"], value.node, value.slot, node.number, len(sockets), kind])
            sockets.append(socket)
        return sockets

    def _saved_node(self, node: Node, order: int, sockets: dict[int, list[Json]], links: list[list[Any]]) -> Json:
        info = self.info[node.kind]
        outputs = [
            {
                "name": name,
                "type": kind,
                "links": [link[0] for link in links if link[1:3] == [node.number, slot]] or None,
            }
            for slot, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
        ]
        pack = PACK_ID if info["python_module"].startswith("custom_nodes.") else CORE_ID
        saved: Json = {
            "id": node.number,
            "type": node.kind,
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": sockets[node.number],
            "outputs": outputs,
            "title": node.title,
            "properties": {"Node name for S&R": node.kind, "cnr_id": pack, **node.properties},
            "widgets_values": widget_values(self._specs(node.kind), node.inputs),
        }
        if not node.title:
            del saved["title"]
        return saved


def widget_values(specs: dict[str, Any], inputs: Json) -> list[Any]:
    """What a saved node holds of its widgets: their values by position, each seed followed by its control."""
    values: list[Any] = []
    for name, spec in specs.items():
        if is_widget(spec):
            values.append(inputs.get(name))
            if has_control(spec):
                values.append(AFTER_GENERATE)
    return values


def is_widget(spec: list[Any]) -> bool:
    """Whether an input, as object_info describes it, is a widget and not only a socket."""
    return isinstance(spec[0], list) or spec[0] in WIDGET_TYPES


def has_control(spec: list[Any]) -> bool:
    """Whether the page puts a control_after_generate widget behind this one."""
    return len(spec) > 1 and bool(spec[1].get("control_after_generate"))


def default_of(spec: list[Any]) -> Any:
    """A widget's value when nobody has touched it."""
    settings = spec[1] if len(spec) > 1 else {}
    options = spec[0] if isinstance(spec[0], list) else settings.get("options", [])
    return settings.get("default", options[0] if options else None)


def _api_value(value: Any) -> Any:
    return [str(value.node), value.slot] if isinstance(value, Link) else value


def _saved_note(note: Node, order: int) -> Json:
    return {
        "id": note.number,
        "type": note.kind,
        "pos": list(note.at),
        "size": list(note.size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": note.title,
        "properties": {},
        "widgets_values": [note.inputs["text"]],
        "color": "#432",
        "bgcolor": "#653",
    }
