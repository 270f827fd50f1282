"""The body of V2's responses: JSON, with binary tensors after it."""
import json
from dataclasses import dataclass


@dataclass
class Made:
    """A response. body: its bytes; header_length: of the JSON if binary data follows, else None."""
    body: bytes
    header_length: int | None


def response(members, made):
    """The Made response. members: of the JSON besides outputs; made: [(Output, array)] with float32 arrays, or nested
    lists of bytes as object arrays. Runs in a native thread: rows are encoded one by one."""
    pieces, binary = [json.dumps(members).encode()[:-1], b', "outputs": ['], []
    for number, (output, array) in enumerate(made):
        datatype = "BYTES" if array.dtype == object else "FP32"
        about = {"name": output.name, "datatype": datatype, "shape": list(array.shape)}
        pieces.append(b", " * (number > 0))
        if output.is_binary:
            content = b"".join(len(one).to_bytes(4, "little") + one for one in array.flat) if datatype == "BYTES" \
                else array.astype("<f4").tobytes()
            binary.append(content)
            pieces.append(json.dumps({**about, "parameters": {"binary_data_size": len(content)}}).encode())
            continue
        pieces += [json.dumps(about).encode()[:-1], b', "data": [']
        for at, row in enumerate(array.reshape(len(array), -1)):
            values = [one.decode() for one in row] if datatype == "BYTES" else row.tolist()
            pieces += [b", " * (at > 0), json.dumps(values).encode()[1:-1]]
        pieces.append(b"]}")
    pieces.append(b"]}")
    text = b"".join(pieces)
    return Made(b"".join([text, *binary]), len(text) if binary else None)
