"""The vocabulary and the sentence patterns of English and five other languages."""

from dataclasses import dataclass

from tiny.corpus.names import MONTHS


@dataclass(frozen=True)
class Language:
    """One language's words for the shared concepts, and the templates that join them.

    Nouns are (gender, word); adjectives give one form per gender in the order of `genders`.
    `subject` and `object` are the articles per gender, and `phrase` orders the noun phrase.
    """

    name: str
    genders: str
    subject: tuple[str, ...]
    object: tuple[str, ...]
    phrase: str
    nouns: tuple[tuple[str, str], ...]
    adjectives: tuple[tuple[str, ...], ...]
    predicates: tuple[tuple[str, ...], ...]
    verbs: tuple[str, ...]
    times: tuple[str, ...]
    months: tuple[str, ...]
    date: str
    pronouns: tuple[str, str]
    seems: str
    sees: str
    arrives: tuple[str, str]
    joiner: str = " "


def _nouns(words: str) -> tuple[tuple[str, str], ...]:
    return tuple((word[0], word[2:]) for word in words.split())


def _forms(words: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.split("/")) for word in words.split())


GERMAN_ADJECTIVES = "ruhig alt schön klein hell kalt neu groß dunkel berühmt"
FRENCH_ADJECTIVES = _forms(
    "tranquille/tranquille ancien/ancienne charmant/charmante minuscule/minuscule clair/claire "
    "froid/froide récent/récente immense/immense sombre/sombre célèbre/célèbre"
)
SPANISH_ADJECTIVES = _forms(
    "tranquilo/tranquila antiguo/antigua hermoso/hermosa pequeño/pequeña claro/clara frío/fría "
    "nuevo/nueva grande/grande oscuro/oscura famoso/famosa"
)
GREEK_ADJECTIVES = _forms(
    "ήσυχος/ήσυχη/ήσυχο παλιός/παλιά/παλιό όμορφος/όμορφη/όμορφο μικρός/μικρή/μικρό "
    "φωτεινός/φωτεινή/φωτεινό κρύος/κρύα/κρύο νέος/νέα/νέο μεγάλος/μεγάλη/μεγάλο "
    "σκοτεινός/σκοτεινή/σκοτεινό διάσημος/διάσημη/διάσημο"
)

# Position i of every list is the same concept in every language: parallel documents rely on it.
ENGLISH = Language(
    name="English",
    genders="-",
    subject=("The",),
    object=("the",),
    phrase="{art} {adj} {noun}",
    nouns=_nouns(
        "-:harbour -:bridge -:house -:street -:garden -:mill -:library -:tower -:market -:river "
        "-:forest -:ship -:room -:window -:bell -:station -:village -:lake -:book -:letter"
    ),
    adjectives=_forms("quiet old beautiful small bright cold new big dark famous"),
    predicates=_forms("quiet old beautiful small bright cold new big dark famous"),
    verbs=("knows", "paints", "seeks", "visits", "describes"),
    times=("in the morning", "in the evening", "in winter", "in summer", "today"),
    months=MONTHS,
    date="{day} {month} {year}",
    pronouns=("He", "She"),
    seems="{np} seems {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("On {D} {P} came to {L}.", "On {D} {P} came to {L}."),
)
GERMAN = Language(
    name="Deutsch",
    genders="mfn",
    subject=("Der", "Die", "Das"),
    object=("den", "die", "das"),
    phrase="{art} {adj} {noun}",
    nouns=_nouns(
        "m:Hafen f:Brücke n:Haus f:Straße m:Garten f:Mühle f:Bibliothek m:Turm m:Markt m:Fluss "
        "m:Wald n:Schiff n:Zimmer n:Fenster f:Glocke m:Bahnhof n:Dorf m:See n:Buch m:Brief"
    ),
    adjectives=tuple(
        ((word[:-2] + "le" if word.endswith("el") else word + "e"),) * 3
        for word in GERMAN_ADJECTIVES.split()
    ),
    predicates=tuple((word,) * 3 for word in GERMAN_ADJECTIVES.split()),
    verbs=("kennt", "malt", "sucht", "besucht", "beschreibt"),
    times=("am Morgen", "am Abend", "im Winter", "im Sommer", "heute"),
    months=tuple(
        "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
    ),
    date="{day}. {month} {year}",
    pronouns=("Er", "Sie"),
    seems="{np} wirkt {time} {pred}.",
    sees="{who} {verb} {np}.",
    arrives=("Am {D} kam {P} nach {L}.", "Am {D} kam {P} nach {L}."),
)
FRENCH = Language(
    name="Français",
    genders="mf",
    subject=("Le", "La"),
    object=("le", "la"),
    phrase="{art} {noun} {adj}",
    nouns=_nouns(
        "m:port m:pont f:maison f:rue m:jardin m:moulin f:bibliothèque f:tour m:marché f:rivière "
        "f:forêt m:navire f:chambre f:fenêtre f:cloche f:gare m:village m:lac m:livre f:lettre"
    ),
    adjectives=FRENCH_ADJECTIVES,
    predicates=FRENCH_ADJECTIVES,
    verbs=("connaît", "peint", "cherche", "visite", "décrit"),
    times=("le matin", "le soir", "en hiver", "en été", "aujourd'hui"),
    months=tuple(
        "janvier février mars avril mai juin juillet août septembre octobre novembre "
        "décembre".split()
    ),
    date="{day} {month} {year}",
    pronouns=("Il", "Elle"),
    seems="{np} semble {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("Le {D}, {P} est arrivé à {L}.", "Le {D}, {P} est arrivée à {L}."),
)
SPANISH = Language(
    name="Español",
    genders="mf",
    subject=("El", "La"),
    object=("el", "la"),
    phrase="{art} {noun} {adj}",
    nouns=_nouns(
        "m:puerto m:puente f:casa f:calle m:jardín m:molino f:biblioteca f:torre m:mercado m:río "
        "m:bosque m:barco f:habitación f:ventana f:campana f:estación m:pueblo m:lago m:libro "
        "f:carta"
    ),
    adjectives=SPANISH_ADJECTIVES,
    predicates=SPANISH_ADJECTIVES,
    verbs=("conoce", "pinta", "busca", "visita", "describe"),
    times=("por la mañana", "por la noche", "en invierno", "en verano", "hoy"),
    months=tuple(
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
        "diciembre".split()
    ),
    date="{day} de {month} de {year}",
    pronouns=("Él", "Ella"),
    seems="{np} parece {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("El {D} {P} llegó a {L}.", "El {D} {P} llegó a {L}."),
)
GREEK = Language(
    name="Ελληνικά",
    genders="mfn",
    subject=("Ο", "Η", "Το"),
    object=("τον", "την", "το"),
    phrase="{art} {adj} {noun}",
    nouns=_nouns(
        "n:λιμάνι f:γέφυρα n:σπίτι m:δρόμος m:κήπος m:μύλος f:βιβλιοθήκη m:πύργος f:αγορά "
        "n:ποτάμι n:δάσος n:πλοίο n:δωμάτιο n:παράθυρο f:καμπάνα m:σταθμός n:χωριό f:λίμνη "
        "n:βιβλίο n:γράμμα"
    ),
    adjectives=GREEK_ADJECTIVES,
    predicates=GREEK_ADJECTIVES,
    verbs=("γνωρίζει", "ζωγραφίζει", "ψάχνει", "επισκέπτεται", "περιγράφει"),
    times=("το πρωί", "το βράδυ", "τον χειμώνα", "το καλοκαίρι", "σήμερα"),
    months=tuple(
        "Ιανουαρίου Φεβρουαρίου Μαρτίου Απριλίου Μαΐου Ιουνίου Ιουλίου Αυγούστου Σεπτεμβρίου "
        "Οκτωβρίου Νοεμβρίου Δεκεμβρίου".split()
    ),
    date="{day} {month} {year}",
    pronouns=("Αυτός", "Αυτή"),
    seems="{np} φαίνεται {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("Στις {D} ο {P} έφτασε στο {L}.", "Στις {D} η {P} έφτασε στο {L}."),
)
JAPANESE = Language(
    name="日本語",
    genders="-",
    subject=("",),
    object=("",),
    phrase="{adj}{noun}",
    nouns=_nouns(
        "-:港 -:橋 -:家 -:道 -:庭 -:水車 -:図書館 -:塔 -:市場 -:川 "
        "-:森 -:船 -:部屋 -:窓 -:鐘 -:駅 -:村 -:湖 -:本 -:手紙"
    ),
    adjectives=_forms("静かな 古い 美しい 小さい 明るい 冷たい 新しい 大きい 暗い 有名な"),
    predicates=_forms("静か 古い 美しい 小さい 明るい 冷たい 新しい 大きい 暗い 有名"),
    verbs=("知っています", "描きます", "探します", "訪れます", "説明します"),
    times=("朝", "夜", "冬", "夏", "今日"),
    months=tuple(str(number) for number in range(1, 13)),
    date="{year}年{month}月{day}日",
    pronouns=("彼", "彼女"),
    seems="{np}は{time}、{pred}です。",
    sees="{who}は{np}を{verb}。",
    arrives=("{D}に{P}は{L}に着きました。", "{D}に{P}は{L}に着きました。"),
    joiner="",
)
FOREIGN = (GERMAN, FRENCH, SPANISH, GREEK, JAPANESE)
FOREIGN_WEIGHTS = (28, 27, 27, 10, 8)
