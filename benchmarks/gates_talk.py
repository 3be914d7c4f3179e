"""What is said around the facts of a training conversation: openings, acknowledgements, small talk.

Owns these wordings; each pool is one text, its parts between bars.
"""

from __future__ import annotations

from gates_words import split


def _parts(text: str) -> tuple[str, ...]:
    """The parts, each with a space to stand before what follows; an empty part says nothing."""
    return tuple(f"{part} " if part else "" for part in split(text, "|"))


SYSTEMS = split(
    "You answer questions about the conversation, briefly and exactly.|You have a good memory."
    "|You are a careful assistant. Answer with what was said and nothing else.|Answer as shortly as possible.",
    "|",
)
OPENINGS = split(
    "What follows has facts in it that matter.|Here are my notes. I will ask about them.|Please study this."
    "|Keep the facts in this text in mind.|Notes from several people, mixed up:|This is long. Read all of it.|",
    "|",
)
CLOSINGS = _parts("||Question:|Now tell me:|That was all.|From the text above:|Using the notes:|Answer briefly.")
REMEMBER = _parts(
    "Remember this:|Please keep in mind:|A note for later:|For your information:||Memorise the following."
    "|I will need this later.|Write this down:"
)
NOTED = split("Written down.|OK, that is saved.|Okay.|Got it.|I have written that down.|Sure, saved.", "|")
AGAIN = _parts("|||Earlier I told you something.|Back to my notes.|Do you still know?|One more question.|By the way:")
CORRECTIONS = _parts("Correction:|That has changed.|Update:|Forget what I said before about this:|I was wrong.")
LOOK_UPS = split(
    "What is the value of {}?|{}?|What belongs to {}?|Look up {}.|Give me the entry for {}.|What does {} have?", "|"
)
NOTATIONS = split('{}: {}|{} = {}|{} -> {}|"{}": "{}",|{} stands for {}.|* {} is {}|export {}={}', "|")
CONTINUE = split('How does this go on: "{}"?|Complete the sentence from the text: "{} …"|Continue: {}', "|")
READ = ("Just read this and say OK.\n\n{}", "No question yet, only something to read:\n\n{}", "{}\n\nReply with OK.")
READ_ANSWERS = ("OK.", "OK")
# Questions that need no memory, with their answers.
TALK = (
    ("How are you today?", "I am fine, thank you. How can I help you?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Thanks, that is all clear.", "You are welcome."),
    ("Can you name three fruits?", "Apples, pears and plums."),
    ("What do bees make?", "Bees make honey."),
    ("Which day comes after Tuesday?", "Wednesday."),
    ("Give me a word that rhymes with house.", "Mouse."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("It is raining here again.", "I am sorry to hear that. I hope it clears up soon."),
    ("What is the opposite of hot?", "Cold."),
    ("What is the freezing point of water?", "Water freezes at 0 degrees Celsius."),
    ("I have to make a phone call, one moment.", "Of course. I will be here."),
    ("What is a short word for a large body of salt water?", "Sea."),
    ("Which planet do we live on?", "We live on Earth."),
    ("Which animal says meow?", "A cat."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("Good morning!", "Good morning! What can I do for you?"),
    ("Name a musical instrument with strings.", "The violin."),
    ("What season follows winter?", "Spring."),
    ("Tell me something short.", "Small steps add up."),
)
