/*
 * The loops over events of binlogs: events out of the packets of a dump, and their check and index.
 *
 * Each handles what is plain and right, and stops before everything else: before what is rare, and before what
 * is wrong. Python (engines/binlog) takes over there for one event; alone it is the twin of these functions.
 * kernels.c says what else holds for all kernels.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "crc_tables.h"

#define CS_EXPORT __attribute__((visibility("default")))

enum {
    HEADER = 19,
    CHECKSUM = 4,
    QUERY = 2,
    STOP = 3,
    ROTATE = 4,
    FORMAT = 15,
    XID = 16,
    EXECUTE_LOAD_QUERY = 18,
    HEARTBEAT = 27,
    MYSQL_GTID = 33,
    MYSQL_ANONYMOUS = 34,
    XA_PREPARE = 38,
    HEARTBEAT_V2 = 41,
    MYSQL_TAGGED_GTID = 42,
    MARIADB_GTID = 162,
    MARIADB_QUERY_COMPRESSED = 165,
};
enum { ARTIFICIAL = 0x20, SEMI_SYNC = 0xEF, PACKET_MAX = 0xFFFFFF, STANDALONE = 1 };
#define EVENT_MAX ((1u << 30) + (1u << 20))
#define NOWHERE UINT64_MAX

static uint32_t crc32_table[8][256];

__attribute__((constructor)) static void prepare(void) { crc_fill_tables(crc32_table, 0xEDB88320u); }

static inline uint16_t get16(const uint8_t *at) { uint16_t v; memcpy(&v, at, 2); return v; }
static inline uint32_t get32(const uint8_t *at) { uint32_t v; memcpy(&v, at, 4); return v; }
static inline uint64_t get64(const uint8_t *at) { uint64_t v; memcpy(&v, at, 8); return v; }

/*
 * Copy the events of the whole packets in `data` to `out`, one behind the other, up to the first packet that
 * is more than a plain event of the file. `lead`: bytes of a packet before its event, 1, or 3 with
 * semi-synchronous replication. Returns the bytes written; `*taken` are those of the packets.
 */
CS_EXPORT size_t cs_binlog_packets(const uint8_t *data, size_t length, size_t lead, uint8_t *out, size_t *taken)
{
    size_t at = 0, written = 0;
    while (length - at >= 4) {
        size_t payload = get32(data + at) & PACKET_MAX, event_length;
        const uint8_t *packet = data + at + 4, *event = packet + lead;
        if (payload == PACKET_MAX || payload < lead + HEADER + CHECKSUM || payload > length - at - 4)
            break;
        event_length = payload - lead;
        if (packet[0] != 0 || (lead == 3 && (packet[1] != SEMI_SYNC || packet[2] != 0)))
            break;
        if (get32(event + 9) != event_length || get16(event + 17) & ARTIFICIAL)
            break;
        if (event[4] == ROTATE || event[4] == FORMAT || event[4] == HEARTBEAT || event[4] == HEARTBEAT_V2)
            break;
        memcpy(out + written, event, event_length);
        written += event_length;
        at += 4 + payload;
    }
    *taken = at;
    return written;
}

/* What an index knows between two events; offsets are of the log, and NOWHERE for none. */
typedef struct {
    uint64_t offset;      /* of the next event */
    uint64_t begin;       /* of the last record that began */
    uint64_t records_end;
    uint64_t first, last; /* records that begin in what is indexed */
    uint64_t number, instant_us, length; /* of the open transaction; length 0: its last event tells the end */
    uint32_t open, standalone;
} cs_binlog_state;

typedef struct {
    uint64_t begin, end, instant_us, number;
} cs_binlog_commit;

/* MySQL's own: a byte, or 2, 3 or 8 bytes behind 252, 253 or 254. 0: it is cut off. */
static int take_packed(const uint8_t *at, size_t room, uint64_t *value)
{
    size_t width;
    if (!room)
        return 0;
    width = at[0] == 252 ? 2 : at[0] == 253 ? 3 : at[0] == 254 ? 8 : 0;
    if (width + 1 > room)
        return 0;
    *value = width ? 0 : at[0];
    memcpy(value, at + (width ? 1 : 0), width ? width : 1);
    return 1;
}

/* Begin a transaction; 0 where the event is malformed. */
static int take_gtid(cs_binlog_state *s, const uint8_t *event, size_t length)
{
    const uint8_t *body = event + HEADER;
    size_t room = length - HEADER - CHECKSUM, cursor = 49;
    uint64_t instant = 0;
    if (event[4] == MARIADB_GTID) {
        if (room < 13)
            return 0;
        s->number = get64(body);
        s->instant_us = get32(event) * (uint64_t)1000000;
        s->length = 0;
        s->standalone = body[12] & STANDALONE;
        return 1;
    }
    if (room < 50)
        return 0;
    memcpy(&instant, body + 42, 7);
    if (instant >> 55) {
        instant &= ((uint64_t)1 << 55) - 1;
        cursor += 7;
    }
    if (cursor > room || !take_packed(body + cursor, room - cursor, &s->length))
        return 0;
    s->number = get64(body + 17);
    s->instant_us = instant;
    s->standalone = 0;
    return 1;
}

static int is_statement(const uint8_t *event, size_t length, const char *text, size_t text_length)
{
    const uint8_t *head = event + HEADER;
    size_t begin;
    if (length < HEADER + 13 + CHECKSUM)
        return 0;
    begin = HEADER + 13 + get16(head + 11) + head[8] + 1;
    return begin + text_length + CHECKSUM == length && memcmp(event + begin, text, text_length) == 0;
}

static int ends_transaction(const cs_binlog_state *s, const uint8_t *event, size_t length)
{
    switch (event[4]) {
    case XID:
    case XA_PREPARE:
        return 1;
    case MARIADB_QUERY_COMPRESSED:
    case EXECUTE_LOAD_QUERY:
        return s->standalone != 0;
    case QUERY:
        return s->standalone || is_statement(event, length, "COMMIT", 6) || is_statement(event, length, "ROLLBACK", 8);
    default:
        return 0;
    }
}

/*
 * Check and note events until something else comes: log that is not all there, what Python is to look at, or
 * commits_max commits. Returns the bytes of the events taken.
 */
CS_EXPORT size_t cs_binlog_walk(cs_binlog_state *s, const uint8_t *data, size_t size, cs_binlog_commit *commits,
                                size_t commits_max, size_t *commit_count)
{
    size_t at = 0;
    *commit_count = 0;
    while (size - at >= HEADER && *commit_count < commits_max) {
        const uint8_t *event = data + at;
        size_t length = get32(event + 9);
        uint8_t kind = event[4];
        int opens = kind == MYSQL_GTID || kind == MYSQL_ANONYMOUS || kind == MARIADB_GTID;
        uint32_t place = (uint32_t)s->offset + (uint32_t)length, said = get32(event + 13);
        cs_binlog_state next;

        if ((uint32_t)s->offset == 0 || memcmp(event, "\xfe" "bin", 4) == 0)
            break;
        if (length < HEADER + CHECKSUM || length > EVENT_MAX || length > size - at)
            break;
        if (kind == ROTATE || kind == STOP || kind == FORMAT || kind == MYSQL_TAGGED_GTID)
            break;
        if (said != place && !(s->open && said == 0))
            break;
        if (~crc_by_tables(crc32_table, ~0u, event, length - CHECKSUM) != get32(event + length - CHECKSUM))
            break;
        next = *s;
        next.offset += length;
        if (opens || !s->open) {
            next.open = 0;
            next.begin = s->offset;
            next.last = s->offset;
            if (next.first == NOWHERE)
                next.first = s->offset;
            if (!opens)
                next.records_end = next.offset;
            else if (!take_gtid(&next, event, length))
                break;
            else
                next.open = 1;
        }
        if (next.open
            && (next.length ? next.offset - next.begin >= next.length : ends_transaction(&next, event, length))) {
            cs_binlog_commit *commit = commits + (*commit_count)++;
            commit->begin = next.begin;
            commit->end = next.offset;
            commit->instant_us = next.instant_us;
            commit->number = next.number;
            next.open = 0;
            next.records_end = next.offset;
        }
        *s = next;
        at += length;
    }
    return at;
}
