/* Asks the check of a grant from the command line: KEY DEVICE ID TYPE PARAMS GRANT. Exit code 0: granted. */
#include "grant.h"

#include <string.h>

int main(int count, char **words) {
    unsigned char key[32];
    if (count != 7 || base64url(words[1], strlen(words[1]), key, sizeof key) != 32) return 2;
    return !granted(words[6], key, words[2], words[3], words[4], words[5]);
}
