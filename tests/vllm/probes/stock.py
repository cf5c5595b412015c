"""Load an export in vLLM without this package's plugin, and print the log-probabilities of a prompt as JSON."""

import json
import os
import sys

os.environ["VLLM_PLUGINS"] = ""  # none at all, ours included
os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # activations as they are

from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    folder, ids = sys.argv[1], json.loads(sys.argv[2])
    engine = LLM(
        folder,
        dtype="float16",
        max_model_len=64,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = engine.generate([TokensPrompt(prompt_token_ids=ids)], sampling, use_tqdm=False)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    quantization = engine.llm_engine.vllm_config.model_config.quantization
    print()
    print(json.dumps({"logprobs": found, "quantization": quantization}))
