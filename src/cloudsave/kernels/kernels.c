/*
 * The loops in which Python would spend its time: the per-page pass, CRC-32C and the walk over WAL records.
 *
 * A plain C library without Python.h, called by ctypes, which releases the interpreter lock. Each function
 * has a twin in Python (pages.py, checksums.py, wal_walk.py) that tests hold equal; the twins serve where
 * this was not built. Nothing here allocates, and no input may make it read or write outside of its buffers.
 *
 * Limit: little-endian machines only, as the formats of PostgreSQL are those of the machine.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "crc_tables.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "cloudsave's kernels are written for little-endian machines; the Python twins serve here"
#endif

#if defined(__x86_64__)
#define CS_X86 1
#include <immintrin.h>
#endif

/* One function compiled for several processors, the best chosen when the library is loaded (needs ifunc). */
#if defined(CS_X86) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define CS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef CS_CLONES
#define CS_CLONES
#endif

#define CS_EXPORT __attribute__((visibility("default")))
#define CS_INLINE static inline __attribute__((always_inline))

#ifndef CS_ABI
#define CS_ABI 5
#endif

/* Raised with every change of a signature or structure; native.py refuses another one. */
CS_EXPORT uint32_t cs_abi(void) { return CS_ABI; }

CS_INLINE uint16_t get16(const uint8_t *at) { uint16_t v; memcpy(&v, at, 2); return v; }
CS_INLINE uint32_t get32(const uint8_t *at) { uint32_t v; memcpy(&v, at, 4); return v; }
CS_INLINE uint64_t get64(const uint8_t *at) { uint64_t v; memcpy(&v, at, 8); return v; }

/* ---- CRC-32C ------------------------------------------------------------------------------------------- */

static uint32_t crc_table[8][256];
static int have_sse42;

__attribute__((constructor)) static void crc_prepare(void)
{
    crc_fill_tables(crc_table, 0x82F63B78u);
#ifdef CS_X86
    __builtin_cpu_init();
    have_sse42 = __builtin_cpu_supports("sse4.2");
#endif
}

static uint32_t crc_by_table(uint32_t crc, const uint8_t *at, size_t length)
{
    return crc_by_tables(crc_table, crc, at, length);
}

#ifdef CS_X86
__attribute__((target("sse4.2"))) static uint32_t crc_by_sse42(uint32_t crc, const uint8_t *at, size_t length)
{
    uint64_t wide = crc;
    for (; length >= 8; at += 8, length -= 8)
        wide = _mm_crc32_u64(wide, get64(at));
    crc = (uint32_t)wide;
    for (; length; at++, length--)
        crc = _mm_crc32_u8(crc, *at);
    return crc;
}
#endif

CS_INLINE uint32_t crc_update(uint32_t crc, const uint8_t *at, size_t length)
{
#ifdef CS_X86
    if (have_sse42)
        return crc_by_sse42(crc, at, length);
#endif
    return crc_by_table(crc, at, length);
}

/* CRC-32C (Castagnoli) of bytes that follow those of which `crc` is the CRC; 0 to begin. */
CS_EXPORT uint32_t cs_crc32c(uint32_t crc, const uint8_t *data, size_t length)
{
    return ~crc_update(~crc, data, length);
}

/* The same without the processor's instruction, for tests of the fallback. */
CS_EXPORT uint32_t cs_crc32c_by_table(uint32_t crc, const uint8_t *data, size_t length)
{
    return ~crc_by_table(~crc, data, length);
}

/* ---- pages of PostgreSQL ------------------------------------------------------------------------------- */

#define LANES 32
#define FNV_PRIME 16777619u
enum { PAGE_OK = 0, PAGE_CHECKSUM = 1, PAGE_NEW = 2, PAGE_HEADER = 3 };
enum { PAGE_VERIFY_CHECKSUM = 1 };

/* Source: checksumBaseOffsets, src/include/storage/checksum_impl.h. */
static const uint32_t lane_seeds[LANES] = {
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
};

CS_INLINE void mix_row(uint32_t *restrict sums, const uint32_t *restrict row)
{
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t mixed = sums[lane] ^ row[lane];
        sums[lane] = (mixed * FNV_PRIME) ^ (mixed >> 17);
    }
}

CS_INLINE uint16_t page_checksum(const uint8_t *page, size_t page_bytes, uint32_t block)
{
    static const uint32_t zeros[LANES];
    uint32_t sums[LANES], row[LANES], folded = 0;

    memcpy(sums, lane_seeds, sizeof sums);
    memcpy(row, page, sizeof row);
    row[2] &= 0xFFFF0000u; /* the checksum itself counts as zero */
    mix_row(sums, row);
    for (size_t at = sizeof row; at < page_bytes; at += sizeof row) {
        memcpy(row, page + at, sizeof row);
        mix_row(sums, row);
    }
    mix_row(sums, zeros);
    mix_row(sums, zeros);
    for (int lane = 0; lane < LANES; lane++)
        folded ^= sums[lane];
    return (uint16_t)((folded ^ block) % 65535 + 1);
}

CS_INLINE int all_zero(const uint8_t *at, size_t length)
{
    uint64_t any = 0;
    for (size_t i = 0; i < length; i += 8)
        any |= get64(at + i);
    return any == 0;
}

/* Source: PageIsVerified() and PageHeaderIsValid, src/backend/storage/page/bufpage.c. */
CS_INLINE int header_plausible(const uint8_t *page, size_t page_bytes)
{
    uint16_t flags = get16(page + 10), lower = get16(page + 12), upper = get16(page + 14);
    uint16_t special = get16(page + 16), size_version = get16(page + 18);
    return (flags & ~7u) == 0 && lower >= 24 && lower <= upper && upper <= special && special <= page_bytes
        && special % 8 == 0 && (size_version & 0xFF00u) == page_bytes && (size_version & 0xFFu) == 4;
}

/*
 * Check `page_count` pages, a multiple of 128 bytes each; `first_block` counts within the whole relation.
 * lsn_out (may be NULL): the LSN of each page. status_out: PAGE_OK, PAGE_CHECKSUM (does not fit),
 * PAGE_NEW (all zero), PAGE_HEADER (no header that a server would accept).
 */
CS_EXPORT CS_CLONES void cs_pg_page_check(const uint8_t *pages, size_t page_count, size_t page_bytes,
                                          uint32_t first_block, uint32_t flags, uint64_t *lsn_out,
                                          uint8_t *status_out)
{
    for (size_t i = 0; i < page_count; i++) {
        const uint8_t *page = pages + i * page_bytes;
        uint8_t status = PAGE_OK;

        if (lsn_out)
            lsn_out[i] = (uint64_t)get32(page) << 32 | get32(page + 4);
        if (get16(page + 14) == 0)
            status = all_zero(page, page_bytes) ? PAGE_NEW : PAGE_HEADER;
        else if ((flags & PAGE_VERIFY_CHECKSUM)
                 && page_checksum(page, page_bytes, first_block + (uint32_t)i) != get16(page + 8))
            status = PAGE_CHECKSUM;
        else if (!header_plausible(page, page_bytes))
            status = PAGE_HEADER;
        status_out[i] = status;
    }
}

/* ---- pages of InnoDB ----------------------------------------------------------------------------------- */

enum { INNODB_CRC32 = 0, INNODB_FULL_CRC32 = 1 };

CS_INLINE uint32_t get32be(const uint8_t *at) { return __builtin_bswap32(get32(at)); }

/*
 * Check `page_count` pages, a multiple of 1024 bytes each. status_out: PAGE_OK, PAGE_CHECKSUM (does not fit, or
 * begin and end are of two versions), PAGE_NEW (all zero).
 * Source: buf_page_is_corrupted(), storage/innobase/buf/buf0buf.cc; the formulas were measured.
 */
CS_EXPORT void cs_innodb_check(const uint8_t *pages, size_t page_count, size_t page_bytes, uint32_t form,
                               uint8_t *status_out)
{
    for (size_t i = 0; i < page_count; i++) {
        const uint8_t *page = pages + i * page_bytes, *end = page + page_bytes;
        int right;

        if (form == INNODB_FULL_CRC32)
            right = get32be(end - 4) == cs_crc32c(0, page, page_bytes - 4) && get32(end - 8) == get32(page + 20);
        else
            right = get32be(page) == (cs_crc32c(0, page + 4, 22) ^ cs_crc32c(0, page + 38, page_bytes - 46))
                && get32(end - 4) == get32(page + 20);
        status_out[i] = right ? PAGE_OK : all_zero(page, page_bytes) ? PAGE_NEW : PAGE_CHECKSUM;
    }
}

/* ---- fingerprints -------------------------------------------------------------------------------------- */

#define TOEPLITZ_WORDS 4

typedef struct {
    uint64_t first, second, any;
} nh_sums;

typedef void nh_page_function(const uint8_t *page, size_t words, const uint32_t *key, nh_sums *sums);

static void nh_page(const uint8_t *page, size_t words, const uint32_t *key, nh_sums *sums)
{
    uint64_t first = 0, second = 0, any = 0;
    for (size_t i = 0; i < words; i += 2) {
        uint32_t even = get32(page + 4 * i), odd = get32(page + 4 * i + 4);
        first += (uint64_t)(uint32_t)(even + key[i]) * (uint32_t)(odd + key[i + 1]);
        second += (uint64_t)(uint32_t)(even + key[i + TOEPLITZ_WORDS])
                * (uint32_t)(odd + key[i + TOEPLITZ_WORDS + 1]);
        any |= even | odd;
    }
    *sums = (nh_sums){first, second, any};
}

#ifdef CS_X86
/* Eight words at a time: the high half of each 64-bit lane times the low half. */
__attribute__((target("avx2")))
static void nh_page_avx2(const uint8_t *page, size_t words, const uint32_t *key, nh_sums *sums)
{
    __m256i first = _mm256_setzero_si256(), second = first, any = first;
    for (size_t i = 0; i < words; i += 8) {
        __m256i data = _mm256_loadu_si256((const __m256i *)(const void *)(page + 4 * i));
        __m256i a = _mm256_add_epi32(data, _mm256_loadu_si256((const __m256i *)(const void *)(key + i)));
        __m256i b = _mm256_add_epi32(
            data, _mm256_loadu_si256((const __m256i *)(const void *)(key + i + TOEPLITZ_WORDS)));
        first = _mm256_add_epi64(first, _mm256_mul_epu32(a, _mm256_srli_epi64(a, 32)));
        second = _mm256_add_epi64(second, _mm256_mul_epu32(b, _mm256_srli_epi64(b, 32)));
        any = _mm256_or_si256(any, data);
    }
    uint64_t one[4], two[4], three[4];
    _mm256_storeu_si256((__m256i *)(void *)one, first);
    _mm256_storeu_si256((__m256i *)(void *)two, second);
    _mm256_storeu_si256((__m256i *)(void *)three, any);
    *sums = (nh_sums){one[0] + one[1] + one[2] + one[3], two[0] + two[1] + two[2] + two[3],
                      three[0] | three[1] | three[2] | three[3]};
}
#endif

CS_INLINE void fingerprint_pages(nh_page_function *page_sums, const uint8_t *pages, size_t page_count,
                                 size_t page_bytes, const uint32_t *key_nh, const uint64_t *m, uint64_t *out,
                                 uint8_t *zero_out)
{
    for (size_t i = 0; i < page_count; i++) {
        nh_sums sums;
        page_sums(pages + i * page_bytes, page_bytes / 4, key_nh, &sums);
        uint64_t x0 = (uint32_t)sums.first, x1 = sums.first >> 32;
        uint64_t x2 = (uint32_t)sums.second, x3 = sums.second >> 32;
        uint64_t high = m[0] + x0 * m[1] + x1 * m[2] + x2 * m[3] + x3 * m[4];
        uint64_t low = m[5] + x0 * m[6] + x1 * m[7] + x2 * m[8] + x3 * m[9];
        out[i] = (high >> 32) << 32 | low >> 32;
        zero_out[i] = sums.any == 0;
    }
}

/*
 * An 8-byte keyed fingerprint of each page (see pages.py for what it promises). page_bytes is a multiple of
 * 32; key_nh holds page_bytes / 4 + 4 words, key_mix 10. zero_out: 1 where a page is all zero bytes.
 */
CS_EXPORT void cs_fingerprint(const uint8_t *pages, size_t page_count, size_t page_bytes,
                              const uint32_t *key_nh, const uint64_t *key_mix, uint64_t *out,
                              uint8_t *zero_out)
{
#ifdef CS_X86
    if (__builtin_cpu_supports("avx2")) {
        fingerprint_pages(nh_page_avx2, pages, page_count, page_bytes, key_nh, key_mix, out, zero_out);
        return;
    }
#endif
    fingerprint_pages(nh_page, pages, page_count, page_bytes, key_nh, key_mix, out, zero_out);
}

/* The same without the processor's wide instructions, for tests of the fallback. */
CS_EXPORT void cs_fingerprint_plain(const uint8_t *pages, size_t page_count, size_t page_bytes,
                                    const uint32_t *key_nh, const uint64_t *key_mix, uint64_t *out,
                                    uint8_t *zero_out)
{
    fingerprint_pages(nh_page, pages, page_count, page_bytes, key_nh, key_mix, out, zero_out);
}

/* ---- WAL ----------------------------------------------------------------------------------------------- */

#define WAL_PAGE 8192u
#define SHORT_HEADER 24u
#define LONG_HEADER 40u
#define RECORD_HEADER 24u
#define RECORD_MAX (1020u << 20) /* XLogRecordMaxSize, src/include/access/xlogrecord.h */
#define RESTORE_NAME 64u

#define HEADERS_MAX 1024u  /* all fragment headers of a record: 33 blocks of 27 bytes, 3 others of up to 5 */
#define BLOCKS_MAX 33u     /* XLR_MAX_BLOCK_ID + 1 */
#define ANY UINT32_MAX

enum { PAGE_CONTINUES = 1, PAGE_LONG = 2, PAGE_FLAGS_ALL = 15, PAGE_OVERWRITES = 8 };
enum { RM_XLOG = 0, RM_XACT = 1, RM_SMGR = 2, RM_DBASE = 4, RM_TBLSPC = 5 };
enum { XLOG_SHUTDOWN = 0x00, XLOG_SWITCH = 0x40, XLOG_PARAMETERS = 0x60, XLOG_RESTORE_POINT = 0x70,
       XLOG_END_OF_RECOVERY = 0x90, XLOG_OVERWRITE = 0xD0 };
enum { XACT_COMMIT = 0x00, XACT_ABORT = 0x20, XACT_COMMIT_PREPARED = 0x30, XACT_ABORT_PREPARED = 0x40,
       XACT_HAS_INFO = 0x80 };
enum { SMGR_CREATE = 0x10, SMGR_TRUNCATE = 0x20, SMGR_TRUNCATE_MAIN = 1, WAL_LEVEL_MINIMAL = 0 };
enum { SPECIAL_UPDATE = 0x01 }; /* XLR_SPECIAL_REL_UPDATE: files change beside the blocks named */
enum { BLOCK_FORK = 0x0F, BLOCK_IMAGE = 0x10, BLOCK_SAME_RELATION = 0x80, FORK_MAIN = 0 };
enum { IMAGE_HOLE = 0x01, IMAGE_COMPRESSED_14 = 0x02, IMAGE_COMPRESSED = 0x1C };
enum { XINFO_DATABASE = 1, XINFO_SUBXACTS = 2, XINFO_RELATIONS = 4, XINFO_INVALIDATIONS = 8,
       XINFO_TWOPHASE = 16, XINFO_ORIGIN = 32, XINFO_GID = 128, XINFO_STATISTICS = 256 };

/* What a call came back for. */
enum { WALK_FED = 0, WALK_EVENTS_FULL = 1, WALK_NAME = 2, WALK_GATHER_MORE = 3, WALK_STOPPED = 4,
       WALK_CHANGES_FULL = 5 };
/* Why the walk stopped; the names are those of wal_walk.StopReason. */
enum { STOP_NONE = 0, STOP_NO_RECORD, STOP_LENGTH, STOP_PREVIOUS, STOP_CRC, STOP_MAGIC, STOP_ADDRESS,
       STOP_TIMELINE, STOP_PAGE_HEADER, STOP_SYSTEM, STOP_CONTINUATION, STOP_CONTENT };
/* What the next byte belongs to. */
enum { AT_RECORD = 0, IN_SKIPPED_RECORD = 1, IN_SWITCHED_SEGMENT = 2 };
enum { EVENT_COMMIT = 1, EVENT_RESTORE_POINT = 2, EVENT_TIMELINE = 3 };
/* What a change says: this block of a relation, or all its blocks from this one on. */
enum { CHANGE_NONE = 0, CHANGE_BLOCK = 1, CHANGE_FROM = 2 };
/* Why a record is gathered. */
enum { FOR_EVENTS = 1, FOR_CHANGES = 2 };

/* Mirrored by native.py and filled there at the begin; `position` is the LSN of the next byte to come. */
typedef struct {
    uint64_t position;
    uint64_t segment_bytes;
    uint64_t system_identifier; /* 0: any */
    uint64_t record_start;      /* of the record under way */
    uint64_t record_first;      /* first that began since the caller reset it; ~0: none */
    uint64_t record_last;       /* last that began; ~0: none */
    uint64_t complete_start;    /* last complete record; ~0: none */
    uint64_t complete_previous; /* the LSN that this record names as the one before it */
    uint64_t records_end;       /* end of it, or of the continuation skipped at the begin */
    uint64_t record_count;      /* complete ones */
    uint64_t overwritten;       /* begin of the record that an overwriting page ended; ~0: none */
    uint64_t consumed;          /* bytes of the call's data that were used up */
    uint64_t stop_position;
    uint64_t seen_from;         /* every record that begins here or later was seen; ~0: not known yet */
    uint32_t timeline_max;      /* 0: any */
    uint32_t timeline;          /* of the last page header; 0: none seen */
    uint32_t magic;             /* of the page headers; 0: none seen */
    uint32_t check_crc;
    uint32_t mode;
    uint32_t began;             /* a page header or record was read: continuations are expected or not */
    uint32_t page_have;         /* bytes of a page header at hand */
    uint32_t record_have;       /* bytes of the record under way, its padding included */
    uint32_t record_total;      /* its length with padding, once record_have >= 4 */
    uint32_t record_length;     /* without padding */
    uint32_t interesting;       /* the record under way is gathered, FOR_... */
    uint32_t crc;               /* raw register over its bytes from 24 on */
    uint32_t stop_reason;
    uint32_t gather_need;
    uint32_t changes_used;      /* entries of the table of changes that are taken */
    uint32_t changes_lost;      /* there was no room for some: everything may have changed */
    uint8_t page_head[LONG_HEADER];
    uint8_t head[RECORD_HEADER];
    uint8_t name[RESTORE_NAME];
    uint8_t headers[HEADERS_MAX]; /* what follows the header of the record under way */
} cs_wal_state;

/* ANY stands for all. */
typedef struct {
    uint32_t space;
    uint32_t database;
    uint32_t relation;
    uint32_t block;
    uint32_t kind;
} cs_wal_change;

/* A hash table of the caller's, of a power of two entries, zeros where free; NULL where none is wanted. */
typedef struct {
    cs_wal_change *entries;
    size_t size;
} change_table;

typedef struct {
    uint64_t start;
    uint64_t end;
    int64_t time;  /* microseconds since 2000-01-01; EVENT_TIMELINE: the timeline before */
    uint32_t xid;  /* EVENT_TIMELINE: the new timeline */
    uint32_t kind;
} cs_wal_event;

/* Invariant: segment_bytes is a power of two, as the server demands. */
CS_INLINE uint64_t in_segment(const cs_wal_state *s, uint64_t position)
{
    return position & (s->segment_bytes - 1);
}

static int stop(cs_wal_state *s, uint32_t reason, uint64_t position)
{
    s->stop_reason = reason;
    s->stop_position = position;
    return WALK_STOPPED;
}

/* Source: XLogReaderValidatePageHeader(), src/backend/access/transam/xlogreader.c. */
static uint32_t check_page_header(cs_wal_state *s, uint64_t address)
{
    const uint8_t *head = s->page_head;
    uint32_t magic = get16(head), info = get16(head + 2), timeline = get32(head + 4);
    int first = in_segment(s, address) == 0;

    switch (magic) {
    case 0xD10D: case 0xD110: case 0xD113: case 0xD116: case 0xD118: break;
    default: return STOP_MAGIC;
    }
    if (s->magic && magic != s->magic)
        return STOP_MAGIC;
    if ((info & ~(uint32_t)PAGE_FLAGS_ALL) || first != !!(info & PAGE_LONG))
        return STOP_PAGE_HEADER;
    if (get64(head + 8) != address)
        return STOP_ADDRESS;
    if (timeline == 0 || timeline < s->timeline || (s->timeline_max && timeline > s->timeline_max))
        return STOP_TIMELINE;
    if (first) {
        if (s->system_identifier && get64(head + 24) != s->system_identifier)
            return STOP_SYSTEM;
        if (get32(head + 32) != s->segment_bytes || get32(head + 36) != WAL_PAGE)
            return STOP_PAGE_HEADER;
    }
    s->magic = magic;
    s->timeline = timeline;
    return STOP_NONE;
}

/* A complete page header is at hand, of the page at `address`: does it continue what came before? */
static uint32_t take_page_header(cs_wal_state *s, uint64_t address)
{
    uint32_t reason = check_page_header(s, address);
    uint32_t info = get16(s->page_head + 2), remaining = get32(s->page_head + 16);

    if (reason)
        return reason;
    if ((info & PAGE_OVERWRITES) && !(info & PAGE_CONTINUES)) {
        if (s->record_have && s->mode == AT_RECORD)
            s->overwritten = s->record_start;
        s->record_have = 0;
        s->mode = AT_RECORD;
    } else if (s->record_have || s->mode == IN_SKIPPED_RECORD) {
        uint32_t expected = s->mode == AT_RECORD ? s->record_length - s->record_have : s->record_total;
        if (!(info & PAGE_CONTINUES) || remaining == 0 || remaining != expected)
            return STOP_CONTINUATION;
    } else if (info & PAGE_CONTINUES) {
        if (s->began || remaining == 0 || remaining > RECORD_MAX)
            return STOP_CONTINUATION;
        s->mode = IN_SKIPPED_RECORD;
        s->record_total = remaining;
        s->seen_from = UINT64_MAX;
    }
    s->began = 1;
    return STOP_NONE;
}

/* Offset of the main data within the record, and its length. The records that we gather have no blocks. */
static int find_main_data(const uint8_t *record, uint32_t length, uint32_t *offset, uint32_t *size)
{
    uint32_t at = RECORD_HEADER;
    while (at < length) {
        uint8_t id = record[at++];
        uint32_t skip = id == 253 ? 2 : id == 252 ? 4 : 0;
        if (skip) {
            at += skip;
            continue;
        }
        if (id == 255 && length - at >= 1 && at < length) {
            *size = record[at];
            at += 1;
        } else if (id == 254 && at < length && length - at >= 4) {
            *size = get32(record + at);
            at += 4;
        } else {
            return 0;
        }
        *offset = at;
        return length - at == *size;
    }
    return 0;
}

/* `at` moved over a counted array of `item` bytes each; past `size` when it does not fit. */
static uint64_t over_array(const uint8_t *data, uint64_t at, uint32_t size, uint32_t item)
{
    if (at + 4 > size)
        return (uint64_t)size + 1;
    return at + 4 + (uint64_t)get32(data + at) * item;
}

/* Where the two-phase part stands; past `size` when data do not fit. `exact`: nothing may be left over. */
static uint64_t find_twophase(const uint8_t *data, uint32_t size, uint32_t statistic_bytes, int exact)
{
    uint32_t xinfo = get32(data + 8);
    uint64_t at = 12 + (xinfo & XINFO_DATABASE ? 8 : 0), end;

    if (xinfo & XINFO_SUBXACTS)
        at = over_array(data, at, size, 4);
    if (xinfo & XINFO_RELATIONS)
        at = over_array(data, at, size, 12);
    if (xinfo & XINFO_STATISTICS)
        at = over_array(data, at, size, statistic_bytes);
    if (xinfo & XINFO_INVALIDATIONS)
        at = over_array(data, at, size, 16);
    if (at + 4 > size)
        return (uint64_t)size + 1;
    end = at + 4;
    if (exact && (xinfo & XINFO_GID)) {
        while (end < size && data[end])
            end++;
        end++;
    }
    if (exact && end + (xinfo & XINFO_ORIGIN ? 16 : 0) != size)
        return (uint64_t)size + 1;
    return at;
}

/* Source: ParseCommitRecord(), src/backend/access/rmgrdesc/xactdesc.c; xl_xact_stats_item grew in 18. */
static int prepared_xid(const cs_wal_state *s, const uint8_t *data, uint32_t size, uint32_t *xid)
{
    uint64_t at;
    if (size < 12 || !(get32(data + 8) & XINFO_TWOPHASE))
        return 0;
    at = find_twophase(data, size, s->magic > 0xD116 ? 16 : 12, !s->magic);
    if (at > size && !s->magic)
        at = find_twophase(data, size, 16, 1);
    if (at > size)
        return 0;
    *xid = get32(data + at);
    return 1;
}

static int take_commit(cs_wal_state *s, const uint8_t *data, uint32_t size, cs_wal_event *event)
{
    uint32_t info = s->head[16];
    if (size < 8)
        return STOP_CONTENT;
    event->kind = EVENT_COMMIT;
    event->time = (int64_t)get64(data);
    event->xid = get32(s->head + 4);
    if ((info & 0x70) == XACT_COMMIT_PREPARED
        && (!(info & XACT_HAS_INFO) || !prepared_xid(s, data, size, &event->xid)))
        return STOP_CONTENT;
    return STOP_NONE;
}

/* A gathered record whose CRC fits: fill `event` where it makes one (kind is left 0 where not). */
static int take_content(cs_wal_state *s, const uint8_t *record, cs_wal_event *event)
{
    uint32_t offset = 0, size = 0;
    uint8_t rmgr = s->head[17], info = s->head[16];

    if (!find_main_data(record, s->record_length, &offset, &size))
        return STOP_CONTENT;
    const uint8_t *data = record + offset;
    if (rmgr == RM_XACT)
        return take_commit(s, data, size, event);
    if ((info & 0xF0) == XLOG_OVERWRITE)
        return size >= 8 && (s->overwritten == UINT64_MAX || get64(data) == s->overwritten) ? STOP_NONE
                                                                                        : STOP_CONTINUATION;
    if (size < 16 || ((info & 0xF0) == XLOG_RESTORE_POINT && size < 8 + RESTORE_NAME))
        return STOP_CONTENT;
    if ((info & 0xF0) == XLOG_RESTORE_POINT) {
        event->kind = EVENT_RESTORE_POINT;
        event->time = (int64_t)get64(data);
        memcpy(s->name, data + 8, RESTORE_NAME);
    } else if (get32(data + 8) != get32(data + 12)) { /* CheckPoint and xl_end_of_recovery alike: new, old */
        event->kind = EVENT_TIMELINE;
        event->xid = get32(data + 8);
        event->time = get32(data + 12);
    }
    return STOP_NONE;
}

/* ---- changes of blocks: see wal_walk.py for what they promise */

static void note_change(cs_wal_state *s, change_table table, cs_wal_change change)
{
    uint64_t mixed = ((uint64_t)change.relation << 32 | change.block) * 0x9E3779B97F4A7C15u;
    mixed ^= ((uint64_t)change.space << 32 | change.database) * 0xC2B2AE3D27D4EB4Fu + change.kind;
    mixed *= 0x9E3779B97F4A7C15u;
    for (size_t at = (size_t)(mixed >> 32);; at++) {
        cs_wal_change *entry = table.entries + (at & (table.size - 1));
        if (entry->kind == CHANGE_NONE) {
            if (s->changes_used >= table.size / 8 * 7) {
                s->changes_lost = 1;
            } else {
                *entry = change;
                s->changes_used++;
            }
            return;
        }
        if (!memcmp(entry, &change, sizeof change))
            return;
    }
}

/*
 * The blocks of main forks that the fragment headers `at` name, of a record with `body` bytes behind its
 * header; `have` of them are at hand. Returns 0 where they are not understood or do not fill the record.
 * Source: DecodeXLogRecord(), src/backend/access/transam/xlogreader.c.
 */
static int find_blocks(const uint8_t *at, uint32_t have, uint32_t body, uint8_t compressed,
                       cs_wal_change *blocks, uint32_t *count)
{
    uint32_t i = 0, payload = 0;
    int last_id = -1, main_seen = 0;
    cs_wal_change now = {0, 0, 0, 0, CHANGE_NONE};

    *count = 0;
    while (body - i > payload) {
        if (main_seen || have - i < 2)
            return 0;
        uint8_t id = at[i++];
        if (id == 255) {
            payload += at[i++];
            main_seen = 1;
        } else if (id == 254 && have - i >= 4) {
            if (get32(at + i) > body)
                return 0;
            payload += get32(at + i);
            i += 4;
            main_seen = 1;
        } else if (id == 253 && have - i >= 2) {
            i += 2;
        } else if (id == 252 && have - i >= 4) {
            i += 4;
        } else if (id < BLOCKS_MAX && id > last_id && have - i >= 3) {
            uint8_t flags = at[i];
            last_id = id;
            payload += get16(at + i + 1);
            i += 3;
            if (flags & BLOCK_IMAGE) {
                if (have - i < 5)
                    return 0;
                payload += get16(at + i);
                uint8_t image = at[i + 4];
                i += 5;
                if ((image & IMAGE_HOLE) && (image & compressed)) {
                    if (have - i < 2)
                        return 0;
                    i += 2;
                }
            }
            if (!(flags & BLOCK_SAME_RELATION)) {
                if (have - i < 12)
                    return 0;
                now = (cs_wal_change){get32(at + i), get32(at + i + 4), get32(at + i + 8), 0, CHANGE_BLOCK};
                i += 12;
            }
            if (have - i < 4 || now.kind == CHANGE_NONE)
                return 0;
            now.block = get32(at + i);
            i += 4;
            if ((flags & BLOCK_FORK) == FORK_MAIN)
                blocks[(*count)++] = now;
        } else {
            return 0;
        }
    }
    return body - i == payload;
}

/* While no page header told the version, the blocks by every layout that fits. Returns 0 where none does. */
static int note_blocks(cs_wal_state *s, change_table table)
{
    uint32_t body = s->record_length - RECORD_HEADER, have = body < HEADERS_MAX ? body : HEADERS_MAX, count;
    cs_wal_change blocks[BLOCKS_MAX];
    int understood = 0;

    for (int old = 0; old < 2; old++) {
        if (s->magic && old != (s->magic == 0xD10D))
            continue;
        if (!find_blocks(s->headers, have, body, old ? IMAGE_COMPRESSED_14 : IMAGE_COMPRESSED, blocks, &count))
            continue;
        understood = 1;
        for (uint32_t i = 0; i < count; i++)
            note_change(s, table, blocks[i]);
    }
    return understood;
}

/* Relations that a commit or abort drops. Source: ParseCommitRecord(), ParseAbortRecord(), xactdesc.c. */
static int note_dropped(cs_wal_state *s, change_table table, const uint8_t *data, uint32_t size)
{
    uint32_t info = s->head[16], operation = info & 0x70;
    uint64_t at = 12;

    if (operation != XACT_COMMIT && operation != XACT_ABORT && operation != XACT_COMMIT_PREPARED
        && operation != XACT_ABORT_PREPARED)
        return 0;
    if (!(info & XACT_HAS_INFO) || size < 12 || !(get32(data + 8) & XINFO_RELATIONS))
        return 0;
    at += get32(data + 8) & XINFO_DATABASE ? 8 : 0;
    if (get32(data + 8) & XINFO_SUBXACTS)
        at = over_array(data, at, size, 4);
    if (over_array(data, at, size, 12) > size)
        return 0;
    for (uint32_t left = get32(data + at); left; left--, at += 12)
        note_change(s, table, (cs_wal_change){get32(data + at + 4), get32(data + at + 8),
                                              get32(data + at + 12), 0, CHANGE_FROM});
    return 1;
}

/* Source: smgr_redo() in storage.c; xl_smgr_create, xl_smgr_truncate. */
static int note_storage(cs_wal_state *s, change_table table, const uint8_t *data, uint32_t size)
{
    uint32_t operation = s->head[16] & 0xF0;
    if (operation == SMGR_CREATE && size >= 16) {
        if (get32(data + 12) == FORK_MAIN)
            note_change(s, table, (cs_wal_change){get32(data), get32(data + 4), get32(data + 8), 0, CHANGE_FROM});
        return 1;
    }
    if (operation == SMGR_TRUNCATE && size >= 20) {
        if (get32(data + 16) & SMGR_TRUNCATE_MAIN)
            note_change(s, table, (cs_wal_change){get32(data + 4), get32(data + 8), get32(data + 12),
                                                  get32(data), CHANGE_FROM});
        return 1;
    }
    return 0;
}

/* What a record changes beside the blocks that it names. Returns 0 where that is not understood. */
static int note_special(cs_wal_state *s, change_table table, const uint8_t *record)
{
    uint32_t offset = 0, size = 0;
    uint8_t rmgr = s->head[17];

    if (!(s->interesting & FOR_CHANGES))
        return !(s->head[16] & SPECIAL_UPDATE);
    if (!find_main_data(record, s->record_length, &offset, &size) || size < 4)
        return 0;
    const uint8_t *data = record + offset;
    if (rmgr == RM_XACT)
        return note_dropped(s, table, data, size);
    if (rmgr == RM_SMGR)
        return note_storage(s, table, data, size);
    if (rmgr == RM_DBASE) /* of every version and operation the database comes first */
        note_change(s, table, (cs_wal_change){ANY, get32(data), ANY, 0, CHANGE_FROM});
    else if (rmgr == RM_TBLSPC)
        note_change(s, table, (cs_wal_change){get32(data), ANY, ANY, 0, CHANGE_FROM});
    else /* XLOG_PARAMETERS: without log of new relations' content nothing can be concluded */
        return size >= 24 && get32(data + 20) != WAL_LEVEL_MINIMAL && !(s->head[16] & SPECIAL_UPDATE);
    return 1;
}

static void note_changes(cs_wal_state *s, change_table table, const uint8_t *record)
{
    int understood = note_blocks(s, table);
    if (!note_special(s, table, record) || !understood)
        note_change(s, table, (cs_wal_change){ANY, ANY, ANY, 0, CHANGE_FROM});
}

/* Why the record under way is to be gathered. */
static uint32_t interest(const cs_wal_state *s, int changes)
{
    uint8_t rmgr = s->head[17], info = s->head[16];
    uint32_t why = 0;
    if (rmgr == RM_XACT) {
        why |= (info & 0x70) == XACT_COMMIT || (info & 0x70) == XACT_COMMIT_PREPARED ? FOR_EVENTS : 0;
        why |= changes && (info & SPECIAL_UPDATE) ? FOR_CHANGES : 0;
    } else if (rmgr == RM_XLOG) {
        info &= 0xF0;
        why |= info == XLOG_SHUTDOWN || info == XLOG_RESTORE_POINT || info == XLOG_END_OF_RECOVERY
                       || info == XLOG_OVERWRITE ? FOR_EVENTS : 0;
        why |= changes && info == XLOG_PARAMETERS ? FOR_CHANGES : 0;
    } else if (changes && (rmgr == RM_SMGR || rmgr == RM_DBASE || rmgr == RM_TBLSPC)) {
        why = FOR_CHANGES;
    }
    return why;
}

/* The length of the record under way is known. */
static uint32_t take_length(cs_wal_state *s)
{
    uint32_t length = get32(s->head);
    if (length == 0)
        return STOP_NO_RECORD;
    if (length < RECORD_HEADER || length > RECORD_MAX)
        return STOP_LENGTH;
    s->record_length = length;
    s->record_total = (length + 7) & ~7u;
    if (s->record_first == UINT64_MAX)
        s->record_first = s->record_start;
    s->record_last = s->record_start;
    return STOP_NONE;
}

/* The header of the record under way is known. */
static uint32_t take_record_header(cs_wal_state *s, int changes)
{
    uint64_t previous = get64(s->head + 8);
    if (s->complete_start == UINT64_MAX ? previous >= s->record_start : previous != s->complete_start)
        return STOP_PREVIOUS;
    s->interesting = interest(s, changes);
    s->crc = 0xFFFFFFFFu;
    return STOP_NONE;
}

/* All bytes of the record under way were taken: check them, note the record, fill `event`. */
static uint32_t finish_record(cs_wal_state *s, const uint8_t *gather, change_table table, cs_wal_event *event)
{
    memset(event, 0, sizeof *event);
    if (s->check_crc && ~crc_update(s->crc, s->head, 20) != get32(s->head + 20))
        return STOP_CRC;
    if (s->interesting & FOR_EVENTS) {
        int reason = take_content(s, gather, event);
        if (reason)
            return (uint32_t)reason;
    }
    if (table.entries)
        note_changes(s, table, gather);
    event->start = s->record_start;
    event->end = s->position;
    s->overwritten = UINT64_MAX;
    s->complete_start = s->record_start;
    s->complete_previous = get64(s->head + 8);
    s->record_count++;
    s->record_have = 0;
    if (s->head[17] == RM_XLOG && (s->head[16] & 0xF0) == XLOG_SWITCH && in_segment(s, s->position))
        s->mode = IN_SWITCHED_SEGMENT;
    else
        s->records_end = s->position;
    return STOP_NONE;
}

/* Take up to `room` bytes of the record under way, all on one page. Returns a STOP_ reason. */
static uint32_t take_record_bytes(cs_wal_state *s, const uint8_t *data, size_t room, uint8_t *gather,
                                  int changes, size_t *taken)
{
    size_t want;
    if (s->record_have < RECORD_HEADER) {
        uint32_t before = s->record_have, reason = STOP_NONE;
        if (before == 0)
            s->record_start = s->position;
        want = RECORD_HEADER - before < room ? RECORD_HEADER - before : room;
        memcpy(s->head + before, data, want);
        s->record_have += (uint32_t)want;
        if (before < 4 && s->record_have >= 4)
            reason = take_length(s);
        if (!reason && s->record_have == RECORD_HEADER)
            reason = take_record_header(s, changes);
        *taken = want;
        return reason;
    }
    want = s->record_total - s->record_have < room ? s->record_total - s->record_have : room;
    if (s->check_crc && s->record_have < s->record_length) {
        size_t covered = s->record_length - s->record_have;
        s->crc = crc_update(s->crc, data, covered < want ? covered : want);
    }
    if (s->interesting)
        memcpy(gather + s->record_have, data, want);
    if (changes && s->record_have - RECORD_HEADER < HEADERS_MAX) {
        size_t at = s->record_have - RECORD_HEADER, left = HEADERS_MAX - at;
        memcpy(s->headers + at, data, left < want ? left : want);
    }
    s->record_have += (uint32_t)want;
    *taken = want;
    return STOP_NONE;
}

/* Bytes of the page header at `s->position` that are still wanted; 0: not in a header. */
static size_t header_wanted(const cs_wal_state *s)
{
    uint64_t in_page = s->position % WAL_PAGE, header;
    if (in_page != s->page_have || in_page >= LONG_HEADER || s->mode == IN_SWITCHED_SEGMENT)
        return 0;
    header = in_segment(s, s->position - in_page) ? SHORT_HEADER : LONG_HEADER;
    return in_page < header ? header - in_page : 0;
}

/*
 * Walk over `length` bytes of WAL that follow those of the last call. Returns why it came back: WALK_FED (all
 * used up), WALK_EVENTS_FULL (call again with the rest after `consumed`), WALK_NAME (the same; the name of
 * the last event, a restore point, is in the state), WALK_GATHER_MORE (the same, with a gather buffer of at
 * least gather_need bytes that begins with what is in this one), WALK_CHANGES_FULL (the same, with the table
 * of changes emptied and changes_used 0), WALK_STOPPED (see stop_reason; no more).
 */
CS_EXPORT int32_t cs_wal_walk(cs_wal_state *s, const uint8_t *data, size_t length, uint8_t *gather,
                              size_t gather_bytes, cs_wal_event *events, size_t events_max,
                              size_t *event_count, cs_wal_change *changes, size_t changes_max)
{
    change_table table = {changes, changes_max};
    size_t used = 0;
    *event_count = 0;
    s->consumed = 0;
    if (s->stop_reason)
        return WALK_STOPPED;
    while (used < length) {
        size_t room = length - used, wanted = header_wanted(s), taken;
        uint32_t reason = STOP_NONE;

        s->consumed = used;
        if (*event_count == events_max)
            return WALK_EVENTS_FULL;
        if (changes && s->changes_used >= changes_max / 2)
            return WALK_CHANGES_FULL;
        if (wanted) {
            uint64_t address = s->position - s->page_have;
            taken = wanted < room ? wanted : room;
            memcpy(s->page_head + s->page_have, data + used, taken);
            s->page_have += (uint32_t)taken;
            s->position += taken;
            used += taken;
            if (taken == wanted) {
                s->page_have = 0;
                reason = take_page_header(s, address);
            }
            if (reason)
                return stop(s, reason, address);
            continue;
        }
        if (s->mode == IN_SWITCHED_SEGMENT) {
            uint64_t left = s->segment_bytes - in_segment(s, s->position);
            taken = left < room ? (size_t)left : room;
            s->position += taken;
            used += taken;
            if (taken == left) {
                s->mode = AT_RECORD;
                s->records_end = s->position;
            }
            continue;
        }
        if (WAL_PAGE - s->position % WAL_PAGE < room)
            room = WAL_PAGE - s->position % WAL_PAGE;
        if (s->mode == IN_SKIPPED_RECORD) {
            /* The padding after it is skipped with it: a page header never stands in between. */
            uint64_t padded = ((s->position + s->record_total + 7) & ~(uint64_t)7) - s->position;
            taken = padded < room ? (size_t)padded : room;
            s->position += taken;
            used += taken;
            s->record_total -= taken < s->record_total ? (uint32_t)taken : s->record_total;
            if (s->record_total == 0 && s->position % 8 == 0) {
                s->mode = AT_RECORD;
                s->records_end = s->seen_from = s->position;
            }
            continue;
        }
        s->began = 1;
        if (s->interesting && s->record_have >= RECORD_HEADER) {
            size_t left = s->record_total - s->record_have;
            size_t need = s->record_have + (left < room ? left : room);
            if (need > gather_bytes) {
                s->gather_need = (uint32_t)need;
                return WALK_GATHER_MORE;
            }
        }
        reason = take_record_bytes(s, data + used, room, gather, changes != NULL, &taken);
        if (reason)
            return stop(s, reason, s->record_start);
        s->position += taken;
        used += taken;
        if (s->record_have >= RECORD_HEADER && s->record_have == s->record_total) {
            cs_wal_event *event = events + *event_count;
            reason = finish_record(s, gather, table, event);
            if (reason)
                return stop(s, reason, s->record_start);
            if (event->kind) {
                ++*event_count;
                if (event->kind == EVENT_RESTORE_POINT) {
                    s->consumed = used;
                    return WALK_NAME;
                }
            }
        }
    }
    s->consumed = used;
    return WALK_FED;
}
