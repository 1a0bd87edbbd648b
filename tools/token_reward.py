"""Print the reward of every token of a text, by a reward model that vLLM serves.

    python tools/token_reward.py --model build/tiny-prm-qwen2-w4a16 --num-labels 2 \
        --text "The Harbour is to be tidied. Step 1: put back the lathe."
"""

import sys

from quantgate.commands.token_table import run

if __name__ == "__main__":
    sys.exit(run("token_reward", "Reward every token of a text."))
