"""Where a model comes from: "pocket", "smollm2", a folder, or an id on the Hugging Face hub.

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")

"smollm2" is SmolLM2-135M-Instruct. It is fetched once, by a command of its own, because it is large:

    python -m refkl_lib.models fetch smollm2

"pocket" is a Llama with 1.5 million random parameters for tests; it is built when first asked for.
"""

from refkl_lib.models.cache import ModelUnavailableError, cache_folder
from refkl_lib.models.load import load_model, load_tokenizer, model_folder, model_origin

__all__ = [
    "ModelUnavailableError",
    "cache_folder",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "model_origin",
]
