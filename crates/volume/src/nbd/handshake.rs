//! The fixed newstyle handshake: what is served here, how, and the client's choice.
//!
//! ```text
//!  server: greeting ─▶ client: flags ─▶ options ⇄ replies ─▶ transmission
//! ```

use super::{MAX_REQUEST_BYTES, take_u16, take_u32, take_u64};

pub(super) const GREETING: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION: u64 = 0x4948_4156_454f_5054;
pub(super) const REPLY: u64 = 0x0003_e889_0455_65a9;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 1 << 1;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
const OPT_STRUCTURED: u32 = 8;
const OPT_LIST_CONTEXTS: u32 = 9;
const OPT_SET_CONTEXTS: u32 = 10;

pub(super) const ACK: u32 = 1;
const SERVER: u32 = 2;
pub(super) const INFO: u32 = 3;
const CONTEXT: u32 = 4;
const ERR_UNSUPPORTED: u32 = (1 << 31) + 1;
const ERR_INVALID: u32 = (1 << 31) + 3;
const ERR_UNKNOWN: u32 = (1 << 31) + 6;
const ERR_TOO_BIG: u32 = (1 << 31) + 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const HAS_FLAGS: u16 = 1;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_ZEROES: u16 = 1 << 6;
const SEND_DF: u16 = 1 << 7;
pub(super) const MULTI_CONN: u16 = 1 << 8;
const FAST_ZERO: u16 = 1 << 11;

/// The one metadata context that is known here, and the number it has.
const ALLOCATION: &[u8] = b"base:allocation";
/// Its number in answers.
const ALLOCATION_ID: u32 = 0;

/// The longest option that is read: an export's name has at most 4,096 bytes.
const MAX_OPTION_BYTES: u32 = 16 << 10;
/// Options after which a client is sent away.
const MAX_OPTIONS: u32 = 64;

/// What is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its name; a client may also leave it empty.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// It cannot be written to.
    pub read_only: bool,
    /// Requests have to be multiples of it, in bytes, and so have offsets.
    pub block: u32,
    /// The size of requests that is best, in bytes.
    pub preferred: u32,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Answers are structured.
    pub structured: bool,
    /// The number of the context in which allocation may be asked for.
    pub allocation: Option<u32>,
}

/// What to do after some bytes were taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read more.
    More,
    /// The transmission phase has begun.
    Transmit(Negotiated),
    /// The connection is over.
    Close,
}

/// A handshake under way.
#[derive(Debug)]
pub struct Handshake {
    flags: Option<bool>,
    agreed: Negotiated,
    options: u32,
}

impl Handshake {
    /// Begins, with the greeting in `out`.
    pub fn begin(out: &mut Vec<u8>) -> Handshake {
        out.extend(GREETING.to_be_bytes());
        out.extend(OPTION.to_be_bytes());
        out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        Handshake { flags: None, agreed: Negotiated::default(), options: 0 }
    }

    /// Takes as much of `input` as makes sense, answers into `out`, and says how
    /// much it took.
    pub fn take(&mut self, offer: &Offer, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
        let mut rest = input;
        loop {
            let before = rest;
            let step = self.one(offer, &mut rest, out);
            match step {
                None => return (input.len() - before.len(), Step::More),
                Some(Step::More) => {}
                Some(step) => return (input.len() - rest.len(), step),
            }
        }
    }

    /// The next message; `None` when it is not whole yet.
    fn one(&mut self, offer: &Offer, rest: &mut &[u8], out: &mut Vec<u8>) -> Option<Step> {
        let Some(no_zeroes) = self.flags else {
            let flags = take_u32(rest)?;
            self.flags = Some(flags & u32::from(NO_ZEROES) != 0);
            let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
            let sound = flags & !known == 0 && flags & u32::from(FIXED_NEWSTYLE) != 0;
            return Some(if sound { Step::More } else { Step::Close });
        };
        let mut ahead = *rest;
        let (magic, option, length) = (take_u64(&mut ahead)?, take_u32(&mut ahead)?, take_u32(&mut ahead)?);
        self.options += 1;
        if magic != OPTION || length > MAX_OPTION_BYTES || self.options > MAX_OPTIONS {
            if magic == OPTION {
                reply(out, option, ERR_TOO_BIG, &[]);
            }
            return Some(Step::Close);
        }
        let Some((data, after)) = ahead.split_at_checked(length as usize) else {
            self.options -= 1;
            return None;
        };
        *rest = after;
        Some(self.option(offer, option, data, no_zeroes, out))
    }

    fn option(&mut self, offer: &Offer, option: u32, data: &[u8], no_zeroes: bool, out: &mut Vec<u8>) -> Step {
        match option {
            OPT_EXPORT_NAME => {
                // It has no way to say no.
                if !offer.is_called(data) {
                    return Step::Close;
                }
                out.extend(offer.size.to_be_bytes());
                out.extend(offer.flags(self.agreed.structured).to_be_bytes());
                if !no_zeroes {
                    out.extend([0; 124]);
                }
                return Step::Transmit(self.agreed);
            }
            OPT_ABORT => {
                reply(out, option, ACK, &[]);
                return Step::Close;
            }
            OPT_LIST if data.is_empty() => {
                let mut entry = (offer.name.len() as u32).to_be_bytes().to_vec();
                entry.extend(offer.name.as_bytes());
                reply(out, option, SERVER, &entry);
                reply(out, option, ACK, &[]);
            }
            OPT_INFO | OPT_GO => match info_name(data) {
                None => reply(out, option, ERR_INVALID, &[]),
                Some(name) if !offer.is_called(name) => reply(out, option, ERR_UNKNOWN, &[]),
                Some(_) => {
                    offer.describe(option, self.agreed.structured, out);
                    reply(out, option, ACK, &[]);
                    if option == OPT_GO {
                        return Step::Transmit(self.agreed);
                    }
                }
            },
            OPT_STRUCTURED if data.is_empty() => {
                self.agreed.structured = true;
                reply(out, option, ACK, &[]);
            }
            OPT_LIST | OPT_STRUCTURED => reply(out, option, ERR_INVALID, &[]),
            OPT_LIST_CONTEXTS | OPT_SET_CONTEXTS => self.contexts(offer, option, data, out),
            _ => reply(out, option, ERR_UNSUPPORTED, &[]),
        }
        Step::More
    }

    fn contexts(&mut self, offer: &Offer, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let listing = option == OPT_LIST_CONTEXTS;
        if !listing {
            self.agreed.allocation = None;
        }
        let Some((name, queries)) = context_queries(data) else {
            return reply(out, option, ERR_INVALID, &[]);
        };
        if !listing && !self.agreed.structured {
            return reply(out, option, ERR_INVALID, &[]);
        }
        if !offer.is_called(name) {
            return reply(out, option, ERR_UNKNOWN, &[]);
        }
        let all = listing && queries.is_empty();
        let asked = |query: &&[u8]| *query == ALLOCATION || listing && *query == b"base:";
        if all || queries.iter().any(asked) {
            if !listing {
                self.agreed.allocation = Some(ALLOCATION_ID);
            }
            let mut context = ALLOCATION_ID.to_be_bytes().to_vec();
            context.extend(ALLOCATION);
            reply(out, option, CONTEXT, &context);
        }
        reply(out, option, ACK, &[]);
    }
}

impl Offer {
    fn is_called(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn flags(&self, structured: bool) -> u16 {
        let writes = if self.read_only { READ_ONLY } else { SEND_TRIM | SEND_ZEROES | FAST_ZERO };
        let fragments = if structured { SEND_DF } else { 0 };
        HAS_FLAGS | SEND_FLUSH | SEND_FUA | MULTI_CONN | writes | fragments
    }

    fn describe(&self, option: u32, structured: bool, out: &mut Vec<u8>) {
        let mut export = INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(self.size.to_be_bytes());
        export.extend(self.flags(structured).to_be_bytes());
        reply(out, option, INFO, &export);
        let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [self.block, self.preferred.max(self.block), MAX_REQUEST_BYTES] {
            blocks.extend(size.to_be_bytes());
        }
        reply(out, option, INFO, &blocks);
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(REPLY.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// The export's name in an INFO or GO; the kinds of information that are asked for
/// do not matter, all are given.
fn info_name(data: &[u8]) -> Option<&[u8]> {
    let mut rest = data;
    let length = take_u32(&mut rest)?;
    let (name, mut rest) = rest.split_at_checked(length as usize)?;
    let kinds = take_u16(&mut rest)?;
    (rest.len() == 2 * usize::from(kinds)).then_some(name)
}

fn context_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut rest = data;
    let name = take_text(&mut rest)?;
    let count = take_u32(&mut rest)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(take_text(&mut rest)?);
    }
    rest.is_empty().then_some((name, queries))
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = take_u32(rest)?;
    let (text, after) = rest.split_at_checked(length as usize)?;
    *rest = after;
    Some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer() -> Offer {
        Offer { name: "web-0".into(), size: 1 << 30, read_only: false, block: 512, preferred: 4096 }
    }

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn go(name: &str) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend([0, 0]);
        option(OPT_GO, &data)
    }

    fn contexts(query: &str) -> Vec<u8> {
        let mut data = 0_u32.to_be_bytes().to_vec();
        data.extend(1_u32.to_be_bytes());
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
        option(OPT_SET_CONTEXTS, &data)
    }

    /// What the client's bytes lead to, taken in pieces of `step` bytes.
    fn talk(bytes: &[u8], step: usize) -> (Step, Vec<u8>, usize) {
        let mut out = Vec::new();
        let mut handshake = Handshake::begin(&mut out);
        let mut pending = Vec::new();
        let mut taken = 0;
        for piece in bytes.chunks(step) {
            pending.extend(piece);
            let (used, next) = handshake.take(&offer(), &pending, &mut out);
            pending.drain(..used);
            taken += used;
            if next != Step::More {
                return (next, out, taken);
            }
        }
        (Step::More, out, taken)
    }

    fn hello() -> Vec<u8> {
        3_u32.to_be_bytes().to_vec()
    }

    #[test]
    fn what_qemu_says_leads_to_structured_answers_and_allocation() {
        let mut bytes = hello();
        bytes.extend(option(11, &[]));
        bytes.extend(option(OPT_STRUCTURED, &[]));
        bytes.extend(contexts("base:allocation"));
        bytes.extend(go("web-0"));
        let requests = bytes.len();
        bytes.extend([1, 2, 3]);
        for step in [1, 7, 4096] {
            let (step, out, taken) = talk(&bytes, step);
            assert_eq!(step, Step::Transmit(Negotiated { structured: true, allocation: Some(ALLOCATION_ID) }));
            assert_eq!(taken, requests, "what follows belongs to the transmission");
            let unsupported = [11_u32.to_be_bytes(), ERR_UNSUPPORTED.to_be_bytes()].concat();
            assert!(out.windows(8).any(|window| window == unsupported), "extended headers are turned down");
        }
    }

    #[test]
    fn an_unknown_name_is_refused_and_may_be_corrected() {
        let mut bytes = hello();
        bytes.extend(go("web-1"));
        let (step, out, _) = talk(&bytes, 4096);
        assert_eq!(step, Step::More);
        assert!(out.windows(4).any(|window| window == ERR_UNKNOWN.to_be_bytes()));
        bytes.extend(go(""));
        assert!(matches!(talk(&bytes, 4096).0, Step::Transmit(_)));
    }

    #[test]
    fn an_old_client_gets_size_and_flags_and_zeroes() {
        let mut bytes = 1_u32.to_be_bytes().to_vec();
        bytes.extend(option(OPT_EXPORT_NAME, b"web-0"));
        let (step, out, _) = talk(&bytes, 4096);
        assert!(matches!(step, Step::Transmit(agreed) if !agreed.structured));
        assert_eq!(out.len(), 18 + 8 + 2 + 124);
    }

    #[test]
    fn clients_that_cannot_be_meant_are_sent_away() {
        for bytes in [vec![0, 0, 0, 0], vec![0, 0, 1, 3], [hello(), vec![0; 16]].concat()] {
            assert_eq!(talk(&bytes, 4096).0, Step::Close);
        }
        let long = [hello(), option(OPT_LIST, &[])].concat();
        let mut long = long;
        let at = long.len() - 4;
        long[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(talk(&long, 4096).0, Step::Close);
        let endless: Vec<u8> = hello().into_iter().chain((0..200).flat_map(|_| option(99, &[]))).collect();
        assert_eq!(talk(&endless, 4096).0, Step::Close);
    }

    #[test]
    fn allocation_needs_structured_answers() {
        let mut bytes = hello();
        bytes.extend(contexts("base:allocation"));
        bytes.extend(go(""));
        assert_eq!(talk(&bytes, 4096).0, Step::Transmit(Negotiated::default()));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_answer_without_bound(bytes: Vec<u8>, step in 1_usize..64) {
            let (_, out, _) = talk(&[hello(), bytes].concat(), step);
            prop_assert!(out.len() < 64 << 10);
        }
    }
}
