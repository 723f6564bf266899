"""What a parameter's name says: which factor of a LoRA pair it is, of which layer, and what lies between the two."""

from collections.abc import Iterable

_SIDES = {
    "lora_A": "lora_B",  # peft, loralib
    "lora_a": "lora_b",  # torchtune
    "lora_embedding_A": "lora_embedding_B",
    "lora_down": "lora_up",  # kohya
}
_A_TOKEN = {b: a for a, b in _SIDES.items()}
_BETWEEN = {
    "lora_E": "AdaLoRA trains a diagonal, lora_E, between A and B",
    "lora_diag": "KaSA trains a diagonal, lora_diag, between A and B",
    "lora_mid": "LyCORIS has a third factor, lora_mid, between A and B (Tucker)",
    "scalar": "LyCORIS trains a scalar that multiplies the product",
}


def role(name: str) -> tuple[str, str] | None:
    """("A" or "B", the name that A has or would have), or None for a name that is no LoRA factor's."""
    tokens = name.split(".")
    for index in reversed(range(len(tokens))):
        token, parent = tokens[index], tokens[index - 1] if index else ""
        if token in _SIDES:
            return "A", name
        if token in _A_TOKEN:
            tokens[index] = _A_TOKEN[token]
            return "B", ".".join(tokens)
        # LoRALinearLayer of older diffusers: ….to_q_lora.down.weight, ….lora.down.weight
        if token in ("down", "up") and (parent in ("lora", "lora_linear_layer") or parent.endswith("_lora")):
            tokens[index] = "down"
            return ("A" if token == "down" else "B"), ".".join(tokens)
    return None


def layer_of(name: str) -> str:
    """Where the pair of an A sits: its name without the token for A, which may leave nothing."""
    return ".".join(_outside(name.split("."), _SIDES))


def between(name: str) -> tuple[str, str] | None:
    """(the layer, in words what lies between its factors), for a name of that."""
    tokens = name.split(".")
    token = next((token for token in tokens[-2:] if token in _BETWEEN), None)  # an adapter's name may follow
    return None if token is None else (".".join(_outside(tokens, (token,))), _BETWEEN[token])


def _outside(tokens: list[str], those: Iterable[str]) -> list[str]:
    left = [token for token in tokens if token not in those]
    return left[:-1] if left and left[-1] == "weight" else left
