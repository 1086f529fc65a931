/*
 * The pass over WAL that says what transactions did: which rows of which relation, which files, which ends.
 *
 * Compiled into the same library as kernels.c and under the same rules: no allocation, no state but the
 * caller's, no read or write outside of the buffers whatever the input. Its twin is in wal_facts.py, which
 * explains the rows; tests hold both equal. Log that comes here was proved when it was captured (CRCs) and
 * authenticated when it was read back, so CRCs are not computed again.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "cloudsave's kernels are written for little-endian machines; the Python twins serve here"
#endif

#define CS_EXPORT __attribute__((visibility("default")))
#define CS_INLINE static inline __attribute__((always_inline))

CS_INLINE uint16_t get16(const uint8_t *at) { uint16_t v; memcpy(&v, at, 2); return v; }
CS_INLINE uint32_t get32(const uint8_t *at) { uint32_t v; memcpy(&v, at, 4); return v; }
CS_INLINE uint64_t get64(const uint8_t *at) { uint64_t v; memcpy(&v, at, 8); return v; }

#define WAL_PAGE 8192u
#define SHORT_HEADER 24u
#define LONG_HEADER 40u
#define RECORD_HEADER 24u
#define RECORD_MAX (1020u << 20)
#define BLOCK_ID_MAX 32u
#define WATCHED_MAX 64u
#define CACHE_SIZE 256u
#define MAGIC_14 0xD10Du
#define MAGIC_15 0xD110u
#define MAGIC_18 0xD118u

enum { PAGE_CONTINUES = 1, PAGE_OVERWRITES = 8 };
enum { RM_XLOG = 0, RM_XACT = 1, RM_SMGR = 2, RM_DBASE = 4, RM_RELMAP = 7, RM_STANDBY = 8, RM_HEAP2 = 9,
       RM_HEAP = 10 };
enum { XINFO_DATABASE = 1, XINFO_SUBXACTS = 2, XINFO_RELATIONS = 4, XINFO_INVALIDATIONS = 8,
       XINFO_TWOPHASE = 16, XINFO_STATISTICS = 256 };
/* What a call came back for. */
enum { FACTS_FED = 0, FACTS_FULL = 1, FACTS_GATHER_MORE = 2, FACTS_WATCH = 3, FACTS_STOPPED = 4 };
/* Why it stopped: values of wal_walk.StopReason. */
enum { STOP_NONE = 0, STOP_NO_RECORD = 1, STOP_LENGTH = 2, STOP_MAGIC = 5, STOP_ADDRESS = 6,
       STOP_CONTINUATION = 10, STOP_CONTENT = 11 };
/* Kinds of rows: wal_facts.FactKind. */
enum { FACT_INSERT = 1, FACT_UPDATE, FACT_DELETE, FACT_TRUNCATE, FACT_FILE_MADE, FACT_FILE_CUT,
       FACT_FILE_DROPPED, FACT_DATABASE_DROPPED, FACT_CHILD, FACT_COMMIT, FACT_ABORT, FACT_PREPARE,
       FACT_HORIZON, FACT_RECORD };

/* Mirrored by wal_facts.py. */
typedef struct {
    uint64_t position;      /* LSN of the next byte */
    uint64_t segment_bytes;
    uint64_t record_start;  /* of the record under way */
    uint64_t consumed;      /* bytes of the call's data that were used up */
    uint64_t stop_position;
    uint32_t magic;
    uint32_t began;         /* a page header or record was read */
    uint32_t page_have;     /* bytes of a page header at hand */
    uint32_t record_have;   /* bytes of the record under way in the gather buffer, padding included */
    uint32_t record_length; /* without padding; 0: not known yet */
    uint32_t skip;          /* bytes left of a record that began before the pass did */
    uint32_t switched;      /* the rest of the segment is empty */
    uint32_t stop_reason;
    uint32_t gather_need;
    uint32_t watched_count;
    uint32_t watched[WATCHED_MAX]; /* relation numbers whose records are wanted whole */
    uint32_t cache[CACHE_SIZE];    /* row number + 1 of rows that may be added to */
    uint8_t page_head[40];
} cs_facts_state;

typedef struct {
    uint64_t start; /* LSN of the (first) record */
    int64_t value;
    uint32_t xid;
    uint32_t kind;
    uint32_t tablespace;
    uint32_t database;
    uint32_t relation;
    uint32_t count;
} cs_fact;

typedef struct {
    cs_facts_state *state;
    cs_fact *rows;
    size_t row_count, rows_max;
    uint8_t *blob;
    size_t blob_bytes, blob_max;
    int full;
} output;

static void put(output *out, const cs_fact *row)
{
    if (out->row_count == out->rows_max) {
        out->full = 1;
        return;
    }
    out->rows[out->row_count++] = *row;
}

/* Add to the row of the same transaction, relation and kind where the cache still knows it. */
static void put_counted(output *out, const cs_fact *row)
{
    uint32_t hash = (row->xid * 0x9E3779B1u) ^ (row->relation * 0x85EBCA77u) ^ (row->kind * 0xC2B2AE3Du);
    uint32_t *slot = out->state->cache + ((hash ^ hash >> 16) % CACHE_SIZE);
    if (*slot) {
        cs_fact *known = out->rows + (*slot - 1);
        if (known->xid == row->xid && known->relation == row->relation && known->kind == row->kind
            && known->database == row->database && known->tablespace == row->tablespace
            && known->count <= UINT32_MAX - row->count) {
            known->count += row->count;
            return;
        }
    }
    put(out, row);
    if (!out->full)
        *slot = (uint32_t)out->row_count;
}

static int put_record(output *out, cs_fact *row, const uint8_t *record, uint32_t length)
{
    if (out->blob_max - out->blob_bytes < length) {
        out->full = 1;
        return STOP_NONE;
    }
    row->kind = FACT_RECORD;
    row->value = (int64_t)out->blob_bytes;
    row->count = length;
    put(out, row);
    if (!out->full) {
        memcpy(out->blob + out->blob_bytes, record, length);
        out->blob_bytes += length;
    }
    return STOP_NONE;
}

/* What the fragment headers say: the first block's relation, the main data, whether a watched one is there. */
typedef struct {
    uint32_t tablespace, database, relation;
    uint32_t blocks;
    uint32_t watched;
    const uint8_t *main;
    uint32_t main_length;
} fragments;

static int is_watched(const cs_facts_state *s, uint32_t relation)
{
    for (uint32_t i = 0; i < s->watched_count && i < WATCHED_MAX; i++)
        if (s->watched[i] == relation)
            return 1;
    return 0;
}

/* Source: DecodeXLogRecord(), src/backend/access/transam/xlogreader.c. Returns whether it is well formed. */
static int read_fragments(const cs_facts_state *s, const uint8_t *record, uint32_t length, fragments *found)
{
    uint64_t at = RECORD_HEADER, payload = 0;
    const uint8_t *relation = NULL;
    uint32_t compressed = s->magic == MAGIC_14 ? 2u : 0x1Cu;

    memset(found, 0, sizeof *found);
    while (length - at > payload) {
        uint8_t id = record[at++];
        if (id == 255 || id == 254) {
            uint32_t size = id == 255 ? 1 : 4;
            if (length - at < size)
                return 0;
            found->main_length = id == 255 ? record[at] : get32(record + at);
            at += size;
            payload += found->main_length;
            break; /* always the last header */
        }
        if (id == 253 || id == 252) {
            at += id == 253 ? 2 : 4;
            if (at > length)
                return 0;
            continue;
        }
        if (id > BLOCK_ID_MAX || length - at < 3)
            return 0;
        uint8_t flags = record[at];
        payload += get16(record + at + 1);
        at += 3;
        if (flags & 0x10) {
            if (length - at < 5)
                return 0;
            payload += get16(record + at);
            uint8_t how = record[at + 4];
            at += 5 + ((how & 1) && (how & compressed) ? 2 : 0);
        }
        if (!(flags & 0x80)) {
            if (at > length || length - at < 12)
                return 0;
            relation = record + at;
            at += 12;
        }
        if (!relation || at > length || length - at < 4)
            return 0;
        at += 4;
        if (!found->blocks++) {
            found->tablespace = get32(relation);
            found->database = get32(relation + 4);
            found->relation = get32(relation + 8);
        }
        found->watched |= (uint32_t)is_watched(s, get32(relation + 8));
    }
    if (at > length || length - at != payload)
        return 0;
    found->main = record + length - found->main_length;
    return 1;
}

/* `at` moved over a counted array of `item` bytes each; past `size` when it does not fit. */
static uint64_t over_array(const uint8_t *data, uint64_t at, uint32_t size, uint32_t item)
{
    if (at + 4 > size)
        return (uint64_t)size + 1;
    return at + 4 + (uint64_t)get32(data + at) * item;
}

/* Source: ParseCommitRecord(), ParseAbortRecord(), src/backend/access/rmgrdesc/xactdesc.c. */
static int take_end(output *out, cs_fact row, uint8_t info, const uint8_t *data, uint32_t size)
{
    uint32_t parts = 0, operation = info & 0x70u;
    uint64_t children = 0, relations = 0, at = 8;

    if (size < 8)
        return STOP_CONTENT;
    if (info & 0x80) {
        if (size < 12)
            return STOP_CONTENT;
        parts = get32(data + 8);
        at = 12;
    }
    if (parts & XINFO_DATABASE) {
        if (at + 8 > size)
            return STOP_CONTENT;
        row.database = get32(data + at);
        row.tablespace = get32(data + at + 4);
        at += 8;
    }
    if (parts & XINFO_SUBXACTS) {
        children = at;
        at = over_array(data, at, size, 4);
    }
    if (at <= size && (parts & XINFO_RELATIONS)) {
        relations = at;
        at = over_array(data, at, size, 12);
    }
    if (at <= size && (parts & XINFO_STATISTICS))
        at = over_array(data, at, size, out->state->magic >= MAGIC_18 ? 16 : 12);
    if (at <= size && (parts & XINFO_INVALIDATIONS))
        at = over_array(data, at, size, 16);
    if (at > size)
        return STOP_CONTENT;
    if (operation == 0x30 || operation == 0x40) {
        if (!(parts & XINFO_TWOPHASE) || at + 4 > size)
            return STOP_CONTENT;
        row.xid = get32(data + at);
    }
    for (uint32_t i = 0; children && i < get32(data + children) && !out->full; i++) {
        cs_fact child = {.start = row.start, .kind = FACT_CHILD, .count = 1, .relation = row.xid};
        child.xid = get32(data + children + 4 + 4 * (uint64_t)i);
        put(out, &child);
    }
    row.kind = operation == 0x00 || operation == 0x30 ? FACT_COMMIT : FACT_ABORT;
    for (uint32_t i = 0; row.kind == FACT_COMMIT && relations && i < get32(data + relations) && !out->full; i++) {
        const uint8_t *file = data + relations + 4 + 12 * (uint64_t)i;
        cs_fact dropped = {.start = row.start, .kind = FACT_FILE_DROPPED, .count = 1, .xid = row.xid,
                           .tablespace = get32(file), .database = get32(file + 4), .relation = get32(file + 8)};
        put(out, &dropped);
    }
    row.value = (int64_t)get64(data);
    row.count = operation >= 0x30 ? 2 : 1; /* 2: of a prepared transaction */
    put(out, &row);
    return STOP_NONE;
}

static int take_heap(output *out, cs_fact *row, uint8_t manager, uint8_t info, const fragments *f)
{
    uint32_t operation = info & 0x70u;
    row->tablespace = f->tablespace;
    row->database = f->database;
    row->relation = f->relation;
    row->count = 1;
    row->kind = 0;
    if (manager == RM_HEAP && operation == 0x30) { /* TRUNCATE names relations by oid, and has no blocks */
        uint32_t count = f->main_length >= 12 ? get32(f->main + 4) : UINT32_MAX;
        if (count > (f->main_length - 12) / 4)
            return STOP_CONTENT;
        for (uint32_t i = 0; i < count && !out->full; i++) {
            cs_fact one = {.start = row->start, .xid = row->xid, .kind = FACT_TRUNCATE, .count = 1,
                           .database = get32(f->main), .relation = get32(f->main + 12 + 4 * (uint64_t)i)};
            put(out, &one);
        }
        return STOP_NONE;
    }
    if (!f->blocks)
        return STOP_NONE;
    if (manager == RM_HEAP2) {
        if (operation == 0x50) {
            if (f->main_length < 4)
                return STOP_CONTENT;
            row->kind = FACT_INSERT;
            row->count = get16(f->main + 2);
        }
    } else if (operation == 0x00) {
        row->kind = FACT_INSERT;
    } else if (operation == 0x10) {
        if (f->main_length < 8)
            return STOP_CONTENT;
        row->kind = f->main[7] & 8 ? 0 : FACT_DELETE; /* 8: takes back a speculative insertion */
    } else if (operation == 0x20 || operation == 0x40) {
        row->kind = FACT_UPDATE;
    }
    if (row->kind)
        put_counted(out, row);
    return STOP_NONE;
}

static int take_file(output *out, cs_fact *row, uint8_t info, const fragments *f)
{
    uint32_t operation = info & 0xF0u, at = operation == 0x20 ? 4 : 0;
    if (operation != 0x10 && operation != 0x20)
        return STOP_NONE;
    if (f->main_length < at + 16)
        return STOP_CONTENT;
    if (operation == 0x10 && get32(f->main + 12)) /* another fork than the main one */
        return STOP_NONE;
    row->kind = operation == 0x10 ? FACT_FILE_MADE : FACT_FILE_CUT;
    row->tablespace = get32(f->main + at);
    row->database = get32(f->main + at + 4);
    row->relation = get32(f->main + at + 8);
    row->count = 1;
    row->value = at ? get32(f->main) : 0;
    put(out, row);
    return STOP_NONE;
}

/* One whole record: rows for what it says. Returns a STOP_ reason. */
static int take_record(output *out, const uint8_t *record, uint32_t length, uint64_t start, int *watch)
{
    cs_facts_state *s = out->state;
    uint8_t info = record[16], manager = record[17];
    fragments f;
    cs_fact row = {.start = start, .xid = get32(record + 4)};
    int wanted = manager == RM_XACT || manager == RM_SMGR || manager == RM_DBASE || manager == RM_RELMAP
              || manager == RM_STANDBY || manager == RM_HEAP || manager == RM_HEAP2
              || (manager == RM_XLOG && ((info & 0xF0u) == 0xA0 || (info & 0xF0u) == 0xB0));

    if (!wanted || (manager == RM_XACT && (info & 0x70u) > 0x40) || (manager == RM_STANDBY && (info & 0xF0u) != 0x10))
        return STOP_NONE;
    if (!read_fragments(s, record, length, &f))
        return STOP_CONTENT;
    if (f.watched || manager == RM_RELMAP) {
        cs_fact whole = row;
        whole.tablespace = f.tablespace;
        whole.database = f.database;
        whole.relation = f.relation;
        put_record(out, &whole, record, length);
        *watch = manager == RM_RELMAP;
        if (out->full) /* all of the record comes again: nothing of it may be counted yet */
            return STOP_NONE;
    }
    switch (manager) {
    case RM_XACT:
        if ((info & 0x70u) == 0x10) {
            row.kind = FACT_PREPARE;
            row.count = 1;
            put(out, &row);
            return STOP_NONE;
        }
        return take_end(out, row, info, f.main, f.main_length);
    case RM_HEAP: case RM_HEAP2:
        return take_heap(out, &row, manager, info, &f);
    case RM_SMGR:
        return take_file(out, &row, info, &f);
    case RM_STANDBY:
        if (f.main_length < 24)
            return STOP_CONTENT;
        row.kind = FACT_HORIZON;
        row.xid = get32(f.main + 16);
        row.relation = get32(f.main + 12);
        row.count = 1;
        put(out, &row);
        return STOP_NONE;
    case RM_DBASE:
        if ((info & 0xF0u) != (s->magic == MAGIC_14 ? 0x10 : 0x20))
            return STOP_NONE;
        if (f.main_length < 4)
            return STOP_CONTENT;
        row.kind = FACT_DATABASE_DROPPED;
        row.database = get32(f.main);
        row.count = 1;
        put(out, &row);
        return STOP_NONE;
    default:
        return STOP_NONE;
    }
}

static int stop(cs_facts_state *s, uint32_t reason, uint64_t position)
{
    s->stop_reason = reason;
    s->stop_position = position;
    return FACTS_STOPPED;
}

/* A page header is complete. Returns a STOP_ reason. */
static uint32_t take_page_header(cs_facts_state *s, uint64_t address)
{
    uint32_t magic = get16(s->page_head), info = get16(s->page_head + 2);
    uint32_t remaining = get32(s->page_head + 16);

    switch (magic) {
    case 0xD10D: case 0xD110: case 0xD113: case 0xD116: case 0xD118: break;
    default: return STOP_MAGIC;
    }
    if (s->magic && s->magic != magic)
        return STOP_MAGIC;
    if (get64(s->page_head + 8) != address)
        return STOP_ADDRESS;
    s->magic = magic;
    if ((info & PAGE_OVERWRITES) && !(info & PAGE_CONTINUES)) {
        s->record_have = s->record_length = s->skip = 0;
    } else if (s->record_have || s->skip) {
        uint32_t expected = s->skip ? s->skip : s->record_length - s->record_have;
        if (!(info & PAGE_CONTINUES) || remaining != expected)
            return STOP_CONTINUATION;
    } else if (info & PAGE_CONTINUES) {
        if (s->began || remaining == 0 || remaining > RECORD_MAX)
            return STOP_CONTINUATION;
        s->skip = remaining;
    }
    s->began = 1;
    return STOP_NONE;
}

static size_t header_wanted(const cs_facts_state *s)
{
    uint64_t in_page = s->position % WAL_PAGE, header;
    if (in_page != s->page_have || in_page >= LONG_HEADER || s->switched)
        return 0;
    header = (s->position - in_page) & (s->segment_bytes - 1) ? SHORT_HEADER : LONG_HEADER;
    return in_page < header ? header - in_page : 0;
}

/* A record is complete: take it, or leave all as it was where the output is full. Returns a FACTS_ answer. */
static int finish(output *out, const uint8_t *record, uint32_t length, uint64_t start, int *watch)
{
    size_t rows = out->row_count, blob = out->blob_bytes;
    cs_facts_state *s = out->state;
    int reason = take_record(out, record, length, start, watch);
    if (reason)
        return stop(s, (uint32_t)reason, start);
    if (out->full) {
        out->row_count = rows;
        out->blob_bytes = blob;
        return FACTS_FULL;
    }
    return FACTS_FED;
}

static void after_record(cs_facts_state *s, const uint8_t *record, uint64_t end)
{
    s->position = end;
    s->record_have = s->record_length = 0;
    if (record[17] == RM_XLOG && (record[16] & 0xF0) == 0x40 && (end & (s->segment_bytes - 1)))
        s->switched = 1;
}

/* Bring the record under way further by what is on this page. Returns a FACTS_ answer. */
static int gather_record(output *out, const uint8_t *data, size_t room, uint8_t *gather, size_t gather_bytes,
                         size_t *taken, int *watch)
{
    cs_facts_state *s = out->state;
    uint32_t have = s->record_have, total = (s->record_length + 7) & ~7u;
    size_t want;

    *taken = 0;
    if (have == 0)
        s->record_start = s->position;
    if (s->record_length == 0) {
        want = RECORD_HEADER - have < room ? RECORD_HEADER - have : room;
        memcpy(gather + have, data, want);
        s->record_have += (uint32_t)want;
        s->position += want;
        *taken = want;
        if (s->record_have >= 4) {
            uint32_t length = get32(gather);
            if (length == 0)
                return stop(s, STOP_NO_RECORD, s->record_start);
            if (length < RECORD_HEADER || length > RECORD_MAX)
                return stop(s, STOP_LENGTH, s->record_start);
            s->record_length = length;
            total = (length + 7) & ~7u;
        }
    } else {
        want = total - have < room ? total - have : room;
        if (have + want > gather_bytes) {
            s->gather_need = total;
            return FACTS_GATHER_MORE;
        }
        memcpy(gather + have, data, want);
        s->record_have += (uint32_t)want;
        s->position += want;
        *taken = want;
    }
    if (s->record_length && s->record_have == total) {
        int answer = finish(out, gather, s->record_length, s->record_start, watch);
        if (answer == FACTS_FULL) { /* the last bytes come again */
            s->record_have -= (uint32_t)*taken;
            s->position -= *taken;
            if (s->record_have < 4)
                s->record_length = 0;
            *taken = 0;
        }
        if (answer != FACTS_FED)
            return answer;
        after_record(s, gather, s->position);
    }
    return FACTS_FED;
}

/*
 * Go over `length` bytes of WAL that follow those of the last call. `gather` holds at least 8192 bytes.
 * Returns why it came back: FACTS_FED (all used up), FACTS_FULL (call again with the rest after `consumed`
 * and empty outputs; larger ones where they were empty), FACTS_GATHER_MORE (the same, with a gather buffer
 * of at least gather_need bytes that begins with what is in this one), FACTS_WATCH (the same; the last
 * record moves catalogues, what is watched may have to change), FACTS_STOPPED (see stop_reason; no more).
 */
CS_EXPORT int32_t cs_wal_facts(cs_facts_state *s, const uint8_t *data, size_t length, uint8_t *gather,
                               size_t gather_bytes, cs_fact *rows, size_t rows_max, size_t *row_count,
                               uint8_t *blob, size_t blob_max, size_t *blob_bytes)
{
    output out = {.state = s, .rows = rows, .rows_max = rows_max, .blob = blob, .blob_max = blob_max};
    size_t used = 0;
    int answer = s->stop_reason ? FACTS_STOPPED : FACTS_FED, watch = 0;

    memset(s->cache, 0, sizeof s->cache);
    while (used < length && answer == FACTS_FED && !watch) {
        size_t room = length - used, wanted = header_wanted(s), taken;
        if (wanted) {
            uint64_t address = s->position - s->page_have;
            taken = wanted < room ? wanted : room;
            memcpy(s->page_head + s->page_have, data + used, taken);
            s->page_have += (uint32_t)taken;
            s->position += taken;
            used += taken;
            if (taken == wanted) {
                uint32_t reason;
                s->page_have = 0;
                reason = take_page_header(s, address);
                if (reason)
                    answer = stop(s, reason, address);
            }
            continue;
        }
        if (s->switched) {
            uint64_t left = s->segment_bytes - (s->position & (s->segment_bytes - 1));
            taken = left < room ? (size_t)left : room;
            s->position += taken;
            used += taken;
            s->switched = taken < left;
            continue;
        }
        if (WAL_PAGE - s->position % WAL_PAGE < room)
            room = WAL_PAGE - s->position % WAL_PAGE;
        s->began = 1;
        if (s->skip || (s->position % 8 && !s->record_have)) {
            uint64_t padded = ((s->position + s->skip + 7) & ~(uint64_t)7) - s->position;
            taken = padded < room ? (size_t)padded : room;
            s->position += taken;
            used += taken;
            s->skip -= taken < s->skip ? (uint32_t)taken : s->skip;
            continue;
        }
        if (s->record_have == 0 && room >= RECORD_HEADER) {
            const uint8_t *record = data + used;
            uint64_t total = ((uint64_t)get32(record) + 7) & ~(uint64_t)7;
            if (total >= RECORD_HEADER && total <= room && get32(record) >= RECORD_HEADER) {
                /* Whole and in one piece, as nearly all are. */
                answer = finish(&out, record, get32(record), s->position, &watch);
                if (answer == FACTS_FED) {
                    after_record(s, record, s->position + total);
                    used += (size_t)total;
                }
                continue;
            }
        }
        answer = gather_record(&out, data + used, room, gather, gather_bytes, &taken, &watch);
        used += taken;
    }
    s->consumed = used;
    *row_count = out.row_count;
    *blob_bytes = out.blob_bytes;
    return answer == FACTS_FED && watch ? FACTS_WATCH : answer;
}
