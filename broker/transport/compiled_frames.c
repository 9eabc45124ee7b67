/* The loops over bytes of `frames` in C, for who builds them: see the howto page "compiled".
 *
 * Each function does what that of the same name in frames.py does, whose docstring is the contract.
 *
 * Rules:
 *
 * 1. No state, and nothing of Python is called back, so the buffer that is read cannot change.
 * 2. Only the stable ABI, so that one build serves CPython 3.11 and all after it.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { FIN = 0x80, TEXT = 1, BINARY = 2, MASKED = 0x80, MAX_BATCH = 1024 };

#define HIGH_BITS 0x8080808080808080u

/* Apply a mask; return whether the outcome has a byte that is not ASCII. */
static int apply_mask(char *to, const unsigned char *from, const unsigned char *mask, Py_ssize_t size) {
    unsigned char twice[8];
    memcpy(twice, mask, 4);
    memcpy(twice + 4, mask, 4);
    uint64_t key, word, seen = 0;
    memcpy(&key, twice, 8);
    Py_ssize_t i = 0;
    for (; i + 8 <= size; i += 8) {
        memcpy(&word, from + i, 8);
        word ^= key;
        seen |= word;
        memcpy(to + i, &word, 8);
    }
    for (; i < size; i++) {
        unsigned char byte = from[i] ^ mask[i & 3];
        seen |= byte;
        to[i] = (char)byte;
    }
    return (seen & HIGH_BITS) != 0;
}

/* Whether bytes are UTF-8: 1 or 0; -1 with an exception set. */
static int is_utf8(const char *bytes, Py_ssize_t size) {
    PyObject *text = PyUnicode_DecodeUTF8(bytes, size, NULL);
    if (text != NULL) {
        Py_DECREF(text);
        return 1;
    }
    if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) return -1;
    PyErr_Clear();
    return 0;
}

static PyObject *unmask(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_buffer payload, mask;
    PyObject *done = NULL;
    (void)module;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "unmask takes a payload and a mask");
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &payload, PyBUF_SIMPLE)) return NULL;
    if (PyObject_GetBuffer(args[1], &mask, PyBUF_SIMPLE)) {
        PyBuffer_Release(&payload);
        return NULL;
    }
    if (mask.len != 4)
        PyErr_SetString(PyExc_ValueError, "a mask has four bytes");
    else if ((done = PyBytes_FromStringAndSize(NULL, payload.len)) != NULL)
        apply_mask(PyBytes_AsString(done), payload.buf, mask.buf, payload.len);
    PyBuffer_Release(&mask);
    PyBuffer_Release(&payload);
    return done;
}

/* Where the payload of the simple message at the front begins, and its length; 0 for any other, or one
 * that has not come as a whole. */
static Py_ssize_t find_payload(const unsigned char *at, Py_ssize_t have, Py_ssize_t limit, Py_ssize_t *length) {
    if (have < 2 || (at[0] != (FIN | TEXT) && at[0] != (FIN | BINARY)) || at[1] < MASKED) return 0;
    uint64_t size = at[1] - MASKED, least = 0;
    Py_ssize_t body = 6;
    if (size >= 126) {
        Py_ssize_t width = size == 126 ? 2 : 8;
        least = size == 126 ? 126 : 65536;
        body += width;
        if (have < body) return 0;
        size = 0;
        for (Py_ssize_t i = 0; i < width; i++) size = size << 8 | at[2 + i];
    }
    if (have < body || size < least || limit < 0 || size > (uint64_t)limit || size > (uint64_t)(have - body))
        return 0;
    *length = (Py_ssize_t)size;
    return body;
}

/* Append the message at the front to `messages`: 1, or 0 if its text is not UTF-8; -1 with an exception
 * set. `at` is its first byte, `body` where its payload is. */
static int append_message(PyObject *messages, unsigned char first, const unsigned char *body, Py_ssize_t length) {
    PyObject *payload = PyBytes_FromStringAndSize(NULL, length);
    if (payload == NULL) return -1;
    char *bytes = PyBytes_AsString(payload);
    int outcome = 1;
    if (apply_mask(bytes, body, body - 4, length) && first == (FIN | TEXT)) outcome = is_utf8(bytes, length);
    if (outcome == 1) {
        PyObject *opcode = PyLong_FromLong(first & 0x0F), *message = NULL;
        if (opcode != NULL) {
            message = PyTuple_Pack(2, opcode, payload);
            Py_DECREF(opcode);
        }
        if (message == NULL || PyList_Append(messages, message)) outcome = -1;
        Py_XDECREF(message);
    }
    Py_DECREF(payload);
    return outcome;
}

static PyObject *take_messages(PyObject *module, PyObject *args, PyObject *named) {
    static char *names[] = {"buffer", "limit", "most", NULL};
    Py_buffer buffer;
    Py_ssize_t limit, most = MAX_BATCH, start = 0;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, named, "y*n|n", names, &buffer, &limit, &most)) return NULL;
    PyObject *messages = PyList_New(0), *done = NULL;
    int outcome = messages == NULL ? -1 : 1;
    while (outcome == 1 && most-- > 0) {
        const unsigned char *at = (const unsigned char *)buffer.buf + start;
        Py_ssize_t length, body = find_payload(at, buffer.len - start, limit, &length);
        if (!body) break;
        outcome = append_message(messages, at[0], at + body, length);
        if (outcome == 1) start += body + length;
    }
    PyBuffer_Release(&buffer);
    if (outcome >= 0) done = Py_BuildValue("On", messages, start);
    Py_XDECREF(messages);
    return done;
}

/* Write the header of an unmasked text frame; return its size, 10 at most. */
static int write_header(char *to, uint64_t length) {
    int width = length < 126 ? 0 : length < 65536 ? 2 : 8;
    to[0] = (char)(FIN | TEXT);
    to[1] = (char)(width == 0 ? length : width == 2 ? 126 : 127);
    for (int i = 0; i < width; i++) to[2 + i] = (char)(length >> 8 * (width - 1 - i));
    return 2 + width;
}

/* One text frame of up to five parts, which are bytes. */
static PyObject *join_frame(const char *const parts[], const Py_ssize_t sizes[], int count) {
    char header[10];
    Py_ssize_t length = 0;
    for (int i = 0; i < count; i++) {
        if (sizes[i] > PY_SSIZE_T_MAX - 16 - length) return PyErr_NoMemory();
        length += sizes[i];
    }
    int begun = write_header(header, (uint64_t)length);
    PyObject *frame = PyBytes_FromStringAndSize(NULL, begun + length);
    if (frame == NULL) return NULL;
    char *to = PyBytes_AsString(frame);
    memcpy(to, header, begun);
    to += begun;
    for (int i = 0; i < count; to += sizes[i++]) memcpy(to, parts[i], sizes[i]);
    return frame;
}

static PyObject *text_frames(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    const char *parts[5];
    Py_ssize_t sizes[5];
    char number[24], *bytes;
    long long first = 0;
    (void)module;
    if (count != 3 && count != 5) {
        PyErr_SetString(PyExc_TypeError, "text_frames takes three arguments, or five");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i += 2) { /* 0: before, 2: behind, 4: end */
        if (PyBytes_AsStringAndSize(args[i], &bytes, &sizes[i])) return NULL;
        parts[i] = bytes;
    }
    if (count == 5 && (first = PyLong_AsLongLong(args[3])) == -1 && PyErr_Occurred()) return NULL;
    if (!PyList_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "contents is a list");
        return NULL;
    }
    Py_ssize_t many = PyList_Size(args[1]);
    PyObject *frames = PyList_New(many);
    for (Py_ssize_t i = 0; frames != NULL && i < many; i++) {
        PyObject *frame = NULL;
        if (!PyBytes_AsStringAndSize(PyList_GetItem(args[1], i), &bytes, &sizes[1])) {
            parts[1] = bytes;
            if (count == 5) {
                parts[3] = number;
                sizes[3] = snprintf(number, sizeof number, "%lld", first + i);
            }
            frame = join_frame(parts, sizes, (int)count);
        }
        if (frame == NULL || PyList_SetItem(frames, i, frame)) Py_CLEAR(frames);
    }
    return frames;
}

static PyMethodDef functions[] = {
    {"unmask", (PyCFunction)(void (*)(void))unmask, METH_FASTCALL, NULL},
    {"take_messages", (PyCFunction)(void (*)(void))take_messages, METH_VARARGS | METH_KEYWORDS, NULL},
    {"text_frames", (PyCFunction)(void (*)(void))text_frames, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "compiled_frames", "See compiled_frames.c.", 0, functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_compiled_frames(void) { return PyModuleDef_Init(&definition); }
