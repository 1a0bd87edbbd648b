"""Print the label of every token of a text, by a token classifier that vLLM serves.

    python tools/token_classification.py --model build/tiny-ner-qwen2-w4a16 --num-labels 6 \
        --text "Trek Fiswell founded Duhein Labs in Port Raipind."
"""

import sys

from quantgate.commands.token_table import run

if __name__ == "__main__":
    sys.exit(run("token_classification", "Label every token of a text."))
