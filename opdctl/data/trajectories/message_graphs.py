"""Traces of verifiers, which prime-rl writes, too: a graph of messages, each with the tokens that it adds.

A path from a root to a leaf is one sequence that the model read and sampled. Imports no torch.
"""

from collections.abc import Iterator
from typing import Any

from opdctl.data.tables import TableRow
from opdctl.errors import OpdctlError


def is_message_graph(row: TableRow) -> bool:
    """Whether a row is a trace."""
    nodes = row.get("nodes")
    return isinstance(nodes, list) and all(isinstance(node, dict) and "message" in node for node in nodes)


def split_paths(row: TableRow, name: str, location: str) -> Iterator[TableRow]:
    """Yield a row for each path of a trace that ends in a leaf: `input_ids`, `loss_mask` and `inference_logprobs` [T]
    if the trace has token ids, else `messages`. name: of a trace that has no id.

    A message on several paths is the student's own on the first of them, so that no token counts twice. Nothing is the
    student's own if the trace is that of an agent that is not trained.

    Raises:
        OpdctlError: the parents, the masks or the log-probs of the messages contradict each other.
    """
    nodes: list[dict[str, Any]] = row["nodes"]
    if not nodes:
        yield {"input_ids": [], "loss_mask": []}
    paths = _find_paths(nodes, location)
    agent = row.get("agent")
    seen = set(range(len(nodes))) if isinstance(agent, dict) and agent.get("trainable") is False else set()
    own_name = row.get("id") or name
    for number, path in enumerate(paths):
        if any(nodes[index].get("token_ids") for index in path):
            columns = _join_tokens(nodes, path, seen, location)
        else:
            columns = {"messages": [nodes[index]["message"] for index in path]}
        seen.update(path)
        values = _find_values(row, nodes[path[-1]])
        yield {"id": f"{own_name}/{number}" if len(paths) > 1 else own_name, **columns, **values}


def _find_paths(nodes: list[dict[str, Any]], location: str) -> list[list[int]]:
    """Return the paths from a root to each leaf. A parent comes before its children in the file."""
    parents = [node.get("parent") for node in nodes]
    for index, parent in enumerate(parents):
        if parent is not None and not (isinstance(parent, int) and 0 <= parent < index):
            raise OpdctlError("invalid_data", f"{location}: `nodes[{index}].parent` is {parent!r}, no earlier node")
    paths = [[index] for index in range(len(nodes)) if index not in parents]
    for path in paths:
        while (parent := parents[path[0]]) is not None:
            path.insert(0, parent)
    return paths


def _join_tokens(nodes: list[dict[str, Any]], path: list[int], seen: set[int], location: str) -> TableRow:
    ids: list[Any] = []
    mask: list[Any] = []
    logprobs: list[Any] = []
    for index in path:
        node, name = nodes[index], f"{location}: `nodes[{index}]"
        own_ids, own_mask, sampled = (node.get(key) or [] for key in ("token_ids", "mask", "logprobs"))
        if not all(isinstance(each, list) for each in (own_ids, own_mask, sampled)):
            raise OpdctlError("invalid_data", f"{name}` must have lists `token_ids`, `mask` and `logprobs`")
        if len(own_mask) != len(own_ids):
            raise OpdctlError("invalid_data", f"{name}.mask` must have {len(own_ids)} values, has {len(own_mask)}")
        if sampled and len(sampled) != sum(map(bool, own_mask)):
            reason = f"must have {sum(map(bool, own_mask))} values, one for each true of `mask`, has {len(sampled)}"
            raise OpdctlError("invalid_data", f"{name}.logprobs` {reason}")
        values = iter(sampled)
        ids += own_ids
        mask += [is_own and index not in seen for is_own in own_mask]
        logprobs += [next(values, None) if is_own else 0.0 for is_own in own_mask]
    is_known = all(value is not None for value, is_own in zip(logprobs, mask, strict=True) if is_own)
    return {"input_ids": ids, "loss_mask": mask} | ({"inference_logprobs": logprobs} if is_known else {})


def _find_values(row: TableRow, leaf: dict[str, Any]) -> TableRow:
    """Return the columns of a trace that are no tokens, by their usual names."""
    task = row.get("task")
    task = task if isinstance(task, dict) else {}
    data = task.get("data")
    named = row.get("rewards")
    rewards = [each for each in named.values() if isinstance(each, dict)] if isinstance(named, dict) else []
    return {
        "prompt_id": task.get("key") or task.get("hash"),
        "answer": data.get("answer") if isinstance(data, dict) else None,
        "reward": sum(each.get("score", 0.0) * each.get("weight", 1.0) for each in rewards) if rewards else None,
        "finish_reason": leaf.get("finish_reason"),
    }
