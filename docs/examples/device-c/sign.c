/* A signed answer, with OpenSSL for HMAC. As a program: SIGN SECRET JSON, both as text; prints the message. */
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* begin sign */
/* Writes base64url without padding; returns how many characters. */
static size_t to_base64url(const unsigned char *bytes, size_t count, char *out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    size_t n = 0;
    for (size_t bit = 0; bit < 8 * count; bit += 6) {
        unsigned next = bit / 8 + 1 < count ? bytes[bit / 8 + 1] : 0;
        out[n++] = digits[((unsigned)bytes[bit / 8] << 8 | next) >> (10 - bit % 8) & 63];
    }
    return n;
}

/* Signs an answer that names its device (iss) and its command (id). `out` has room for 4/3 of it and 100 more. */
size_t sign_answer(const char *json, const unsigned char secret[32], char *out) {
    unsigned char mac[32];
    /* {"alg":"HS256","typ":"answer+jwt"}: it never changes */
    size_t n = (size_t)sprintf(out, "eyJhbGciOiJIUzI1NiIsInR5cCI6ImFuc3dlcitqd3QifQ.");
    n += to_base64url((const unsigned char *)json, strlen(json), out + n);
    HMAC(EVP_sha256(), secret, 32, (const unsigned char *)out, n, mac, NULL);
    out[n++] = '.';
    return n + to_base64url(mac, sizeof mac, out + n);
}
/* end sign */

int main(int count, char **words) {
    if (count != 3 || strlen(words[1]) != 32) return 2;
    char *out = malloc(2 * strlen(words[2]) + 200);
    if (!out) return 2;
    size_t n = sign_answer(words[2], (const unsigned char *)words[1], out);
    printf("%.*s\n", (int)n, out);
    free(out);
    return 0;
}
