"""
The plain text of instructions and chats, for fineweb.py --format and sample.py --format; fineweb.py --help shows it.

GPT-2 has no tokens for roles. A dialogue is a list of (prompt, answer) pairs, each encoded apart, and end-of-text comes
before the dialogue and after every answer.
"""

ROLES = ("system", "user", "assistant")


def alpaca_prompt(instruction: str, input: str = "") -> str:
    middle = f"Input: {input}\n\n" if input.strip() else ""
    return f"Instruction: {instruction}\n\n{middle}Answer:"


def chat_pairs(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(role, content) messages, of which the last is the assistant's -> (prompt, answer) pairs, one for each answer."""
    pairs, prompt = [], ""
    for number, (role, content) in enumerate(messages):
        prompt += ("\n\n" if number else "") + f"{role.capitalize()}:"
        if role == "assistant":
            pairs.append((prompt, f" {content}"))
            prompt = ""
        else:
            prompt += f" {content}"
    return pairs


def encode_question(tokenizer, messages: list[tuple[str, str]]) -> list[int]:
    """The ids that the assistant's next answer continues, as fineweb.py writes them for the same messages."""
    *answered, (question, _) = chat_pairs([*messages, ("assistant", "")])
    ids = [tokenizer.eot]
    for prompt, answer in answered:
        ids += [*tokenizer.encode(prompt), *tokenizer.encode(answer), tokenizer.eot]
    return ids + tokenizer.encode(question)
