"""Dialogues through a tokenizer's chat template."""

import re

from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer.tokenizer import encode
from mateconv_jax.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def encode_chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    """A dialogue through the tokenizer's chat template. Only the template's own control tokens become control ids.

    The template is rendered around place-holders, and what users wrote is encoded as plain text where those stood. For
    ordinary contents the ids equal transformers' `apply_chat_template`.

    Args:
      messages: [{"role": …, "content": …}, …].
      add_generation_prompt: end with the header of an assistant's answer.

    Raises:
      UserError: the tokenizer has no chat template, or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise UserError("chat: this tokenizer has no chat template (expected one in tokenizer_config.json)")
    contents = [message["content"] for message in messages]
    hidden = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    try:
        rendered = tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # whatever the template raises
        raise UserError(f"chat: the chat template does not take these messages ({error})") from error
    assert isinstance(rendered, str)
    ids = []
    # re.split alternates the template's text and the numbers of the contents.
    for i, part in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
        if i % 2:
            ids += encode(tokenizer, [contents[int(part)]])[0]
        else:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return ids
