# Placeholder by the lead so that tests run; helper BASE overwrites this file.
_HF = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}


def hf_module_name(module: str, part: str, family: object = None) -> str:
    if part == "whole":
        return module.replace("linear_proj", "o_proj").replace("linear_fc2", "down_proj")
    return module.rpartition(".")[0] + "." + _HF[part]
