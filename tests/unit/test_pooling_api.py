"""Empty prompts are refused before vLLM sees them."""

import pytest

from quantgate.patches.pooling_api import refuse_empty


@pytest.mark.parametrize("prompts", ["", [""], ["a", ""], [], {"prompt": ""}, [{"prompt": ""}]])
def test_what_is_empty_is_refused(prompts: object) -> None:
    if prompts == []:
        refuse_empty(prompts)  # no request at all is vLLM's to answer
        return
    with pytest.raises(ValueError, match=r"prompt \d is empty"):
        refuse_empty(prompts)


def test_what_is_not_empty_is_not() -> None:
    for prompts in ("a", ["a", "b"], [3, 4], [[3], [4]], {"prompt_token_ids": [1]}):
        refuse_empty(prompts)
