//! Sealed heartbeats: how a keeper asks for its node's lease, and how the
//! coordinator answers, in UDP datagrams of a fixed size.
//!
//! ```text
//!  0     4   5    6    7  8        16       24        32
//! ┌─────┬───┬────┬────┬──┬────────┬────────┬─────────┬──────────┬─────┐
//! │HFHB │ver│kind│path│ 0│ sender │  life  │ counter │ sealed   │ tag │
//! └─────┴───┴────┴────┴──┴────────┴────────┴─────────┴──────────┴─────┘
//!  └────────────── in clear, authenticated ──────────┘
//! ```
//! Integers are little-endian. Nothing here allocates once a [`Link`] exists.
//!
//! **Keys.** Each node has a static X25519 key. HKDF-SHA256 turns the shared
//! secret of two nodes into one key per direction (asking, answering), sender,
//! receiver and *life of the sender*, bound to the cluster's id. A life is drawn
//! at random when a process starts, so a restart never meets an old key again,
//! and within a life (path, counter) is the nonce of ChaCha20-Poly1305: it
//! cannot repeat. RFC 7748, RFC 5869, RFC 8439.
//!
//! **Replay.** A replayed grant does no harm: [`NodeLease`] counts it from the
//! `sent` that it echoes, so it can only name an end that is known already. A
//! replayed heartbeat would do harm twice. Answering it would push the
//! coordinator's bound away and hide a dead node: [`Freshness`] therefore takes
//! every (path, counter) once. And one of an *earlier life* would look like a
//! restarted keeper, from which the coordinator concludes that everything the
//! admitted keeper ran is dead, while it runs. That needs no attacker, only a slow
//! second network. So a life that is not the accepted one has to echo a
//! random challenge, drawn after the last life was accepted.
//!
//! [`NodeLease`]: holdfast_core::lease::NodeLease

use std::fmt;

use holdfast_core::lease::{BootTime, Grant, Heartbeat, LeaseTiming};
use holdfast_core::{Incarnation, NodeId, NodeTerm};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use x25519_dalek::{PublicKey, StaticSecret};

const MAGIC: [u8; 4] = *b"HFHB";
const VERSION: u8 = 2;
const HEADER_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const LONGEST_BODY: usize = 48;

/// The longest datagram, in bytes.
pub const DATAGRAM_BYTES: usize = HEADER_BYTES + LONGEST_BODY + TAG_BYTES;

/// How many addresses of one node a heartbeat may be sent to.
pub const PATHS: usize = 16;

/// How far behind the newest heartbeat one may be that comes over another path.
const REORDERED: u64 = 8;

/// What is wrong with a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A public key of low order: everybody could compute the shared secret.
    #[error("the heartbeat key of node {node} is not a valid X25519 public key: remove the node and join it again")]
    Weak {
        /// Whose key it is.
        node: NodeId,
    },
    /// The system gave no random numbers.
    #[error("the system has no random numbers to give (getrandom failed): heartbeats need them")]
    NoRandomness,
}

/// A node's static X25519 secret. Its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretKey(pub [u8; 32]);

impl SecretKey {
    /// A new one.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = [0; 32];
        SystemRandom::new().fill(&mut bytes).map_err(|_| KeyError::NoRandomness)?;
        Ok(SecretKey(bytes))
    }

    /// What the other nodes have to know of it.
    pub fn public(&self) -> [u8; 32] {
        PublicKey::from(&StaticSecret::from(self.0)).to_bytes()
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// A random number that is not zero: a life, or a challenge.
pub fn draw() -> Result<u64, KeyError> {
    let mut bytes = [0; 8];
    SystemRandom::new().fill(&mut bytes).map_err(|_| KeyError::NoRandomness)?;
    Ok(u64::from_le_bytes(bytes).max(1))
}

/// Who asks and who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A keeper: seals heartbeats, opens grants and challenges.
    Keeper,
    /// An agent: opens heartbeats, seals grants and challenges.
    Agent,
}

/// What a datagram says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A keeper asks for a lease. Sender, life and counter of the header are the
    /// heartbeat's node, incarnation and sequence.
    Heartbeat {
        /// When it was sent, on the sender's clock.
        sent: BootTime,
        /// The last challenge of the receiver, zero when there was none.
        echo: u64,
        /// The newest heartbeat of this life that the receiver answered with a
        /// grant or a probe which arrived, zero when there was none.
        acknowledged: u64,
    },
    /// The coordinator grants a lease.
    Grant(Grant),
    /// The receiver does not know this life of the keeper: it has to echo this.
    Challenge {
        /// The life that is challenged.
        incarnation: Incarnation,
        /// What it has to echo.
        challenge: u64,
    },
    /// The coordinator grants nothing, but tells that a heartbeat arrived: the
    /// next ones say whether this did.
    Probe {
        /// The life of the keeper that asked.
        incarnation: Incarnation,
        /// The heartbeat that is answered.
        sequence: u64,
    },
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Heartbeat { .. } => 1,
            Message::Grant(_) => 2,
            Message::Challenge { .. } => 3,
            Message::Probe { .. } => 4,
        }
    }

    fn words(&self) -> ([u64; LONGEST_BODY / 8], usize) {
        match *self {
            Message::Heartbeat { sent, echo, acknowledged } => ([sent.0, echo, acknowledged, 0, 0, 0], 3),
            Message::Grant(grant) => (
                [
                    grant.incarnation.0,
                    grant.sequence,
                    grant.sent.0,
                    grant.term.0,
                    grant.timing.length_ms,
                    grant.timing.heartbeat_ms,
                ],
                6,
            ),
            Message::Challenge { incarnation, challenge } => ([incarnation.0, challenge, 0, 0, 0, 0], 2),
            Message::Probe { incarnation, sequence } => ([incarnation.0, sequence, 0, 0, 0, 0], 2),
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Option<Message> {
        let mut words = [0; LONGEST_BODY / 8];
        let (chunks, rest) = body.as_chunks::<8>();
        if !rest.is_empty() || chunks.len() > words.len() {
            return None;
        }
        for (word, chunk) in words.iter_mut().zip(chunks) {
            *word = u64::from_le_bytes(*chunk);
        }
        match (kind, chunks.len()) {
            (1, 3) => Some(Message::Heartbeat { sent: BootTime(words[0]), echo: words[1], acknowledged: words[2] }),
            (2, 6) => Some(Message::Grant(Grant {
                incarnation: Incarnation(words[0]),
                sequence: words[1],
                sent: BootTime(words[2]),
                term: NodeTerm(words[3]),
                timing: LeaseTiming { length_ms: words[4], heartbeat_ms: words[5] },
            })),
            (3, 2) => Some(Message::Challenge { incarnation: Incarnation(words[0]), challenge: words[1] }),
            (4, 2) => Some(Message::Probe { incarnation: Incarnation(words[0]), sequence: words[1] }),
            _ => None,
        }
    }
}

/// The part of a datagram that travels in clear. Nothing in it is to be believed
/// before [`Link::open`] has authenticated it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: u8,
    /// By which of the receiver's addresses it was sent, below [`PATHS`].
    pub path: u8,
    /// Who says that they sent it.
    pub from: NodeId,
    /// The sender's life.
    pub life: u64,
    /// Counts what was sent in this life.
    pub counter: u64,
}

impl Header {
    /// Reads the header, `None` if this is no datagram of ours.
    pub fn parse(datagram: &[u8]) -> Option<Header> {
        let header: &[u8; HEADER_BYTES] = datagram.first_chunk()?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let ours = header[..4] == MAGIC
            && header[4] == VERSION
            && usize::from(header[6]) < PATHS
            && header[7] == 0
            && datagram.len() <= DATAGRAM_BYTES;
        ours.then(|| Header {
            kind: header[5],
            path: header[6],
            from: NodeId(word(8)),
            life: word(16),
            counter: word(24),
        })
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = self.kind;
        bytes[6] = self.path;
        bytes[8..16].copy_from_slice(&self.from.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.life.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }

    fn nonce(&self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[3] = self.path;
        nonce[4..].copy_from_slice(&self.counter.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// The heartbeat that a [`Message::Heartbeat`] stands for.
    pub fn heartbeat(&self, sent: BootTime, acknowledged: u64) -> Heartbeat {
        Heartbeat { node: self.from, incarnation: Incarnation(self.life), sequence: self.counter, sent, acknowledged }
    }
}

/// A sealed datagram.
#[derive(Clone, Copy, Debug)]
pub struct Datagram {
    bytes: [u8; DATAGRAM_BYTES],
    length: usize,
}

impl Datagram {
    /// What to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The keys that one side of a pair of nodes has.
pub struct Link {
    me: NodeId,
    peer: NodeId,
    public: [u8; 32],
    side: Side,
    life: u64,
    secret: Prk,
    sealing: LessSafeKey,
    opening: Option<(u64, LessSafeKey)>,
}

/// Who is linked: the ends of a [`Link`] and what their keys are bound to.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// The cluster.
    pub cluster: Uuid,
    /// This node.
    pub me: NodeId,
    /// This node's secret.
    pub secret: &'a SecretKey,
    /// The other node; may be this one: its keeper asks its own agent, too.
    pub peer: NodeId,
    /// The other node's public key.
    pub public: [u8; 32],
}

impl Link {
    /// Derives the keys of `side`, for a process whose random `life` it is.
    pub fn new(ends: &Ends<'_>, side: Side, life: u64) -> Result<Link, KeyError> {
        let shared = StaticSecret::from(ends.secret.0).diffie_hellman(&ends.public.into());
        if !shared.was_contributory() {
            return Err(KeyError::Weak { node: ends.peer });
        }
        let mut salt = *b"holdfast heartbeat 1\0\0\0\0................";
        salt[24..].copy_from_slice(ends.cluster.as_bytes());
        let secret = Salt::new(HKDF_SHA256, &salt).extract(shared.as_bytes());
        let sealing = derive(&secret, side, ends.me, ends.peer, life);
        Ok(Link { me: ends.me, peer: ends.peer, public: ends.public, side, life, secret, sealing, opening: None })
    }

    /// The other node.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    /// The other node's public key.
    pub fn public(&self) -> [u8; 32] {
        self.public
    }

    /// Seals a message. `counter` must never be used twice with one `path`.
    pub fn seal(&self, path: u8, counter: u64, message: &Message) -> Datagram {
        let header = Header { kind: message.kind(), path, from: self.me, life: self.life, counter };
        let clear = header.encode();
        let (words, count) = message.words();
        let mut bytes = [0; DATAGRAM_BYTES];
        bytes[..HEADER_BYTES].copy_from_slice(&clear);
        for (chunk, word) in bytes[HEADER_BYTES..].chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        let end = HEADER_BYTES + count * 8;
        // It fails only for texts of more than 256 GiB.
        let tag = self
            .sealing
            .seal_in_place_separate_tag(header.nonce(), Aad::from(clear), &mut bytes[HEADER_BYTES..end])
            .expect("a body of 48 bytes can be sealed");
        bytes[end..end + TAG_BYTES].copy_from_slice(tag.as_ref());
        Datagram { bytes, length: end + TAG_BYTES }
    }

    /// Opens a datagram in place, `None` if it is not from the other node's other
    /// side or was changed on its way.
    pub fn open(&mut self, header: &Header, datagram: &mut [u8]) -> Option<Message> {
        if header.from != self.peer {
            return None;
        }
        let other = match self.side {
            Side::Keeper => Side::Agent,
            Side::Agent => Side::Keeper,
        };
        let (clear, sealed) = datagram.split_at_mut_checked(HEADER_BYTES)?;
        let known = self.opening.as_ref().filter(|(life, _)| *life == header.life);
        let message = match known {
            Some((_, key)) => unseal(key, header, clear, sealed)?,
            None => {
                let key = derive(&self.secret, other, self.peer, self.me, header.life);
                let message = unseal(&key, header, clear, sealed)?;
                self.opening = Some((header.life, key));
                message
            }
        };
        // The other side's key seals all kinds of answers, never a question.
        let asks = matches!(message, Message::Heartbeat { .. });
        (asks == (other == Side::Keeper)).then_some(message)
    }
}

fn unseal(key: &LessSafeKey, header: &Header, clear: &[u8], sealed: &mut [u8]) -> Option<Message> {
    let body = key.open_in_place(header.nonce(), Aad::from(clear), sealed).ok()?;
    Message::decode(header.kind, body)
}

fn derive(secret: &Prk, side: Side, from: NodeId, to: NodeId, life: u64) -> LessSafeKey {
    let label: &[u8] = match side {
        Side::Keeper => b"ask",
        Side::Agent => b"answer",
    };
    let (from, to, life) = (from.0.to_le_bytes(), to.0.to_le_bytes(), life.to_le_bytes());
    let context = [label, &from, &to, &life];
    // It fails only for keys of more than 8,160 bytes.
    let key = secret.expand(&context, &CHACHA20_POLY1305).expect("HKDF-SHA256 can give 32 bytes");
    LessSafeKey::new(UnboundKey::from(key))
}

/// What a receiver remembers of one keeper, so that each heartbeat counts once.
#[derive(Clone, Copy, Debug)]
pub struct Freshness {
    life: Option<u64>,
    challenge: u64,
    newest: u64,
    last: [u64; PATHS],
}

/// What to do with an authentic heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Take it in; `true` when it is the first of a life that was not accepted before.
    Fresh(bool),
    /// Seen before, or long overtaken.
    Stale,
    /// Its life has to echo this first.
    Challenge(u64),
}

impl Freshness {
    /// Nothing accepted yet.
    pub fn new() -> Result<Freshness, KeyError> {
        Ok(Freshness { life: None, challenge: draw()?, newest: 0, last: [0; PATHS] })
    }

    /// The keeper's life that was accepted last.
    pub fn life(&self) -> Option<Incarnation> {
        self.life.map(Incarnation)
    }

    /// Judges an authentic heartbeat.
    pub fn judge(&mut self, header: &Header, echo: u64) -> Result<Verdict, KeyError> {
        let path = usize::from(header.path);
        if self.life == Some(header.life) {
            let overtaken = header.counter.saturating_add(REORDERED) < self.newest;
            if header.counter <= self.last[path] || overtaken {
                return Ok(Verdict::Stale);
            }
            self.last[path] = header.counter;
            self.newest = self.newest.max(header.counter);
            return Ok(Verdict::Fresh(false));
        }
        if echo != self.challenge {
            return Ok(Verdict::Challenge(self.challenge));
        }
        // A new challenge at once: what this life or the last one sent so far can
        // never replace an accepted life again.
        self.challenge = draw()?;
        self.life = Some(header.life);
        self.last = [0; PATHS];
        self.last[path] = header.counter;
        self.newest = header.counter;
        Ok(Verdict::Fresh(true))
    }
}

#[cfg(test)]
mod tests;
