/* Cyclic redundancy checks by tables of eight steps, for any reflected polynomial of 32 bits. */
#ifndef CS_CRC_TABLES_H
#define CS_CRC_TABLES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline void crc_fill_tables(uint32_t table[8][256], uint32_t polynomial)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (polynomial & (0u - (crc & 1)));
        table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++)
            table[t][i] = table[0][table[t - 1][i] & 0xFF] ^ (table[t - 1][i] >> 8);
}

/* Raw register in, raw register out: no inversion. */
static inline uint32_t crc_by_tables(uint32_t table[8][256], uint32_t crc, const uint8_t *at, size_t length)
{
    for (; length >= 8; at += 8, length -= 8) {
        uint32_t low, high;
        memcpy(&low, at, 4);
        memcpy(&high, at + 4, 4);
        low ^= crc;
        crc = table[7][low & 0xFF] ^ table[6][(low >> 8) & 0xFF] ^ table[5][(low >> 16) & 0xFF]
            ^ table[4][low >> 24] ^ table[3][high & 0xFF] ^ table[2][(high >> 8) & 0xFF]
            ^ table[1][(high >> 16) & 0xFF] ^ table[0][high >> 24];
    }
    for (; length; at++, length--)
        crc = table[0][(crc ^ *at) & 0xFF] ^ (crc >> 8);
    return crc;
}

#endif
