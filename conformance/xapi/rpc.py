"""The two dialects of XAPI: JSON-RPC 2.0 at ``/jsonrpc``, where numbers are numbers, and XML-RPC at
``/``, where integers are strings (only doubles and booleans have types of their own).
"""

import json
import xmlrpc.client
from typing import Any

from conformance.xapi.calls import Calls
from conformance.xapi.pool import XapiFailure

__all__ = ["answer_json", "answer_xml"]


def answer_json(calls: Calls, body: bytes) -> bytes:
    """One call in JSON."""
    request = json.loads(body)
    answer: dict[str, Any] = {"jsonrpc": "2.0", "id": request.get("id")}
    try:
        answer["result"] = calls.call(str(request["method"]), list(request["params"]))
    except XapiFailure as failure:
        code, *details = failure.words
        answer["error"] = {"code": 1, "message": code, "data": details}
    return json.dumps(answer).encode()


def answer_xml(calls: Calls, body: bytes) -> bytes:
    """One call in XML."""
    parameters, method = xmlrpc.client.loads(body)
    try:
        value = calls.call(str(method), list(parameters))
        answer = {"Status": "Success", "Value": _stringly(value)}
    except XapiFailure as failure:
        answer = {"Status": "Failure", "ErrorDescription": failure.words}
    return xmlrpc.client.dumps((answer,), methodresponse=True, allow_none=False).encode()


def _stringly(value: Any) -> Any:
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return {key: _stringly(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_stringly(each) for each in value]
    return value
