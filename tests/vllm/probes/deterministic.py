"""Print, as JSON, log-probabilities of requests alone and in batches of several kinds, prompts and new tokens alike.

python deterministic.py OPTIONS ADAPTERS REQUESTS, all JSON: of vLLM; name -> folder; [token ids, adapter or null].
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

options, adapters, requests = map(json.loads, sys.argv[1:])
engine = LLM(**options)
lora = {name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), 1)}
sampling = SamplingParams(
    temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=0, logprobs=3, detokenize=False
)


def ask(numbers):
    """Return number -> the log-probabilities of its prompt and of its new tokens, all in one batch."""
    outputs = engine.generate(
        [{"prompt_token_ids": requests[number][0]} for number in numbers],
        sampling,
        lora_request=[lora.get(requests[number][1]) for number in numbers],
        use_tqdm=False,
    )
    found = {}
    for number, output in zip(numbers, outputs, strict=True):
        known = zip(requests[number][0][1:], output.prompt_logprobs[1:], strict=True)
        prompt = [scores[token].logprob for token, scores in known]
        new = [sorted((token, score.logprob) for token, score in each.items()) for each in output.outputs[0].logprobs]
        found[number] = [prompt, new]
    return found


every = list(range(len(requests)))
alone = {}
for number in every:
    alone |= ask([number])
print(
    json.dumps(
        {
            "alone": alone,
            "together": ask(every),
            "the other way round": ask(every[::-1]),
            "half of them": ask(every[::2]),
            "two": ask(every[1:3]),
        }
    )
)
