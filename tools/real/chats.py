"""Conversations, written for the probe: a user's turn and an assistant's, in turns."""

CHATS: tuple[tuple[str, ...], ...] = (
    (
        "Why is the sky blue?",
        "Sunlight contains every colour. Molecules of air scatter short wavelengths much more "
        "strongly than long ones, so blue light reaches your eyes from every direction, while red "
        "light mostly travels straight on. Violet is scattered even more, but the sun emits less "
        "of it and our eyes are less sensitive to it.",
    ),
    (
        "Write a short poem about rain.",
        "Soft on the window, the grey rain sings,\nOf rivers and rooftops and small green things.\n"
        "It drums on the street till the puddles shine,\nThen leaves the air tasting of earth and "
        "pine.",
    ),
    (
        "What is 17 times 23?",
        "17 times 23 is 391. One way to see it: 17 times 20 is 340, 17 times 3 is 51, and 340 plus "
        "51 is 391.",
        "And divided by 7?",
        "391 divided by 7 is 55 with a remainder of 6, or about 55.857.",
    ),
    (
        "How do I reverse a list in Python?",
        "You can use slicing, which returns a new list:\n\n```python\nnumbers = [1, 2, 3]\n"
        "reversed_numbers = numbers[::-1]\n```\n\nTo reverse it in place, call `numbers.reverse()`."
        " To loop over it backwards without a copy, use `for number in reversed(numbers):`.",
    ),
    (
        "Give me three tips for sleeping better.",
        "1. Go to bed and get up at the same time every day, also at weekends.\n2. Keep the room "
        "dark, quiet and cool.\n3. Avoid coffee in the afternoon, and put your phone away an hour "
        "before you want to sleep.",
    ),
    (
        "Translate to French: The train leaves at eight o'clock.",
        "Le train part à huit heures.",
        "Now to German, please.",
        "Der Zug fährt um acht Uhr ab.",
        "And to Spanish?",
        "El tren sale a las ocho.",
    ),
    (
        "Summarize what photosynthesis is for a ten-year-old.",
        "Plants make their own food. Their leaves catch sunlight and use its energy to turn water "
        "from the soil and carbon dioxide from the air into sugar. The plant eats the sugar to "
        "grow, and it gives off oxygen, which we need to breathe.",
    ),
    (
        "My code prints None. Why?\n\ndef add(a, b):\n    a + b\n\nprint(add(1, 2))",
        "The function computes `a + b` but does not return it, and a Python function without a "
        "`return` statement returns `None`. Write:\n\n```python\ndef add(a, b):\n    return a + b\n"
        "```\n\nThen `print(add(1, 2))` prints 3.",
    ),
    (
        "What should I pack for a day of hiking in autumn?",
        "Wear layers: a shirt that dries quickly, a warm sweater and a waterproof jacket. Take "
        "sturdy shoes, at least a litre and a half of water, something to eat, a map, a small "
        "first-aid kit and a head torch, because it gets dark early.",
    ),
    (
        "Who wrote Pride and Prejudice, and when?",
        "Jane Austen wrote it. It was published anonymously in London in January 1813; the title "
        "page only said that it was by the author of Sense and Sensibility.",
    ),
    (
        "Convert this to JSON: name Ada, age 36, languages English and French.",
        '{\n  "name": "Ada",\n  "age": 36,\n  "languages": ["English", "French"]\n}',
        "Add an email address.",
        '{\n  "name": "Ada",\n  "age": 36,\n  "languages": ["English", "French"],\n  "email": '
        '"ada@example.org"\n}',
    ),
    (
        "Explain the difference between weather and climate.",
        "Weather is what happens in the air at one place over hours or days: rain this afternoon, "
        "frost tomorrow morning. Climate is the average of the weather over decades, usually "
        "thirty years, together with how much it varies. A cold week says little about the "
        "climate; a trend over many years says a lot.",
    ),
)
