# Everything from a fresh Debian 12 or 13 with Rust: `make demo` and `make test`
# install the Debian packages that they miss, so they need root.

ARGS ?=
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)

# To link Rust programs, and to unpack the guest's kernel modules.
BUILD_PACKAGES := gcc libc6-dev xz-utils
# To run VMs, and to build hosts from namespaces.
RUN_PACKAGES := qemu-system-x86 qemu-utils iproute2 nftables

.PHONY: help
help:
	@echo 'make demo [ARGS="--json out.json"]  show a cluster of three nodes: migration, failover'
	@echo 'make test                           check everything, with real guests'
	@echo 'make quick                          formatting, clippy and structure only'
	@echo 'make fix                            format, and renew generated files'
	@echo 'make deny                           licences and advisories (needs cargo-deny)'
	@echo 'make deb                            the Debian package (needs cargo-deb)'
	@echo 'make install [DESTDIR=/]            the binary, its unit, man pages, completions'

.PHONY: demo
demo: release guest
	$(TARGET)/release/holdfast demo $(ARGS)

.PHONY: test
test: system
	$(CARGO) xtask verify

.PHONY: quick
quick: rust
	$(CARGO) xtask verify --quick

.PHONY: fix
fix: system
	$(CARGO) xtask fix

.PHONY: deny
deny:
	$(CARGO) deny --workspace check

.PHONY: release
release: system
	$(CARGO) build --release -p holdfast

.PHONY: guest
guest: system
	guest/build.sh

.PHONY: deb
deb: documents
	$(CARGO) deb --no-build -p holdfast

# Man pages and completions, from the definition of the command line.
.PHONY: documents
documents: release
	rm -rf $(TARGET)/man $(TARGET)/completions
	$(TARGET)/release/holdfast man $(TARGET)/man
	install -d $(TARGET)/completions
	set -e; for shell in bash zsh fish; do \
		$(TARGET)/release/holdfast completions $$shell > $(TARGET)/completions/$$shell; \
	done

# What was written into the configuration stays.
.PHONY: install
install: documents
	install -D -m 755 $(TARGET)/release/holdfast $(DESTDIR)/usr/bin/holdfast
	install -D -m 644 packaging/holdfast.service $(DESTDIR)/usr/lib/systemd/system/holdfast.service
	test -e $(DESTDIR)/etc/holdfast/config.toml || \
		install -D -m 644 packaging/config.toml $(DESTDIR)/etc/holdfast/config.toml
	install -d $(DESTDIR)/usr/share/man/man1
	install -m 644 $(TARGET)/man/*.1 $(DESTDIR)/usr/share/man/man1
	install -D -m 644 $(TARGET)/completions/bash $(DESTDIR)/usr/share/bash-completion/completions/holdfast
	install -D -m 644 $(TARGET)/completions/zsh $(DESTDIR)/usr/share/zsh/vendor-completions/_holdfast
	install -D -m 644 $(TARGET)/completions/fish $(DESTDIR)/usr/share/fish/vendor_completions.d/holdfast.fish

# Installs what is missing, and says what it cannot.
.PHONY: system
system: rust
	@missing=; for package in $(BUILD_PACKAGES) $(RUN_PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
	done; \
	if [ "$$(id -u)" != 0 ]; then \
		echo "This builds hosts from network namespaces, which needs root: run it with sudo or as root." >&2; exit 1; \
	fi; \
	if [ -n "$$missing" ]; then \
		echo "Installing$$missing"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get -qq update && apt-get -qq -y --no-install-recommends install $$missing >/dev/null \
			|| { echo "Could not install$$missing: is this Debian 12 or 13, and is the network up?" >&2; exit 1; }; \
	fi

.PHONY: rust
rust:
	@command -v $(CARGO) >/dev/null || { \
		echo "There is no cargo: install Rust from https://rustup.rs (with sudo, root's PATH has to name it)." >&2; exit 1; }
