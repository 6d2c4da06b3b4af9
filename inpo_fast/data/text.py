"""What a prompt may be: text that every tokenizer takes."""


def unusable(prompt: object) -> str | None:
    """What is wrong with a prompt, None where nothing is.

    JSON can hold halves of characters ("\\ud800" without its other half): Python keeps them, and tokenizers refuse
    them, hours later perhaps. NUL ends a text for much that is written in C.
    """
    if not isinstance(prompt, str):
        return f"the prompt is no text ({type(prompt).__name__})"
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as problem:
        code = ord(prompt[problem.start])
        return f"the prompt has half a character (\\u{code:04x}, a lone surrogate) at {problem.start}"
    if (at := prompt.find("\0")) >= 0:
        return f"the prompt has a NUL character at {at}"
    return None
